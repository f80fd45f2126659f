// Filter, order and search of the items; the state is kept in the address after "#".
(() => {
  const form = document.getElementById("controls"), list = document.getElementById("items");
  if (!form || !list) return;
  const all = [...list.children], said = form.querySelector("output");
  const fields = [...form.elements].filter((field) => field.name);
  const number = (item) => (item.dataset.score === "" ? NaN : Number(item.dataset.score));
  const order = {
    low: (a, b) => number(a) - number(b),
    high: (a, b) => number(b) - number(a),
  };
  function show() {
    const state = Object.fromEntries(fields.map((field) => [field.name, field.value]));
    const words = (state.find || "").toLowerCase();
    const kept = all.filter((item) =>
      (!state.category || item.dataset.category === state.category) &&
      (!words || item.textContent.toLowerCase().includes(words)));
    if (order[state.sort]) {
      const known = (item) => !Number.isNaN(number(item));  // what has no score stands last in either order
      kept.splice(0, kept.length, ...kept.filter(known).sort(order[state.sort]), ...kept.filter((item) => !known(item)));
    }
    list.replaceChildren(...kept);
    said.textContent = `${kept.length} of ${all.length} items`;
    return state;
  }
  function read() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    for (const field of fields) {
      if (wanted.has(field.name)) field.value = wanted.get(field.name);
    }
    show();
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    const state = Object.entries(show()).filter(([, value]) => value);
    history.replaceState(null, "", "#" + new URLSearchParams(state));
  });
  window.addEventListener("hashchange", read);
  form.hidden = false;
  read();
})();
