// Curves of several runs over each other, drawn as SVG, with one range of steps for all charts; and the sliders of the image grids.
(() => {
  const { runs, curves } = JSON.parse(document.getElementById("data").textContent);
  const charts = document.getElementById("charts"), controls = document.getElementById("controls");
  const W = 420, H = 230, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 24, NS = "http://www.w3.org/2000/svg";
  const colour = (run) => `var(--s${(runs.indexOf(run) + 1) % 4})`, dash = (run) => ["", "7 4", "2 3"][Math.floor(runs.indexOf(run) / 4) % 3];
  let range = null;

  function node(name, parent, attributes, text) {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  const number = (x) => (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5) ? x.toExponential(1) : String(Number(x.toPrecision(4))));

  // Mean of a window that is centred and shrinks at the ends.
  function smoothed(points, width) {
    return width ? points.map(([x], i) => {
      const near = points.slice(Math.max(0, i - width), i + width + 1);
      return [x, near.reduce((sum, point) => sum + point[1], 0) / near.length];
    }) : points;
  }

  function draw(metric, box) {
    const log = controls.log.checked, width = Number(controls.smooth.value);
    const lines = Object.entries(curves[metric]).map(([run, points]) => {
      const inside = (p) => (!range || (p[0] >= range[0] && p[0] <= range[1])) && (!log || p[1] > 0);
      return [run, points.filter(inside), smoothed(points, width).filter(inside)];
    }).filter((line) => line[2].length);
    box.replaceChildren();
    const svg = node("svg", box, { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${metric}: ${lines.map(([run, , p]) => `${run} ends at ${number(p.at(-1)[1])}`).join(", ")}` });
    if (!lines.length) return node("text", svg, { x: W / 2, y: H / 2, "text-anchor": "middle", fill: "var(--soft)" }, "nothing here");
    const all = lines.flatMap((line) => line[2]), scale = log ? Math.log10 : (y) => y, back = log ? (y) => 10 ** y : (y) => y;
    let [x0, x1] = range ?? [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
    let low = Math.min(...all.map((p) => scale(p[1]))), high = Math.max(...all.map((p) => scale(p[1])));
    if (x0 === x1) x1 = x0 + 1;
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
    const px = (x) => LEFT + ((x - x0) / (x1 - x0)) * (W - LEFT - RIGHT), py = (y) => H - BOTTOM - ((scale(y) - low) / (high - low)) * (H - TOP - BOTTOM);
    for (let i = 0; i <= 4; i++) {
      const y = back(low + ((high - low) * i) / 4), x = x0 + ((x1 - x0) * i) / 4;
      node("line", svg, { x1: LEFT, x2: W - RIGHT, y1: py(y), y2: py(y), stroke: "var(--line)" });
      node("text", svg, { x: LEFT - 5, y: py(y) + 4, "text-anchor": "end", fill: "var(--soft)", "font-size": 11 }, number(y));
      node("text", svg, { x: px(x), y: H - 6, "text-anchor": ["start", "middle", "middle", "middle", "end"][i], fill: "var(--soft)", "font-size": 11 }, Math.round(x));
    }
    const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${px(p[0]).toFixed(1)} ${py(p[1]).toFixed(1)}`).join("");
    for (const [run, raw, points] of lines) {
      if (width) node("path", svg, { d: path(raw.filter((p) => scale(p[1]) >= low && scale(p[1]) <= high)), fill: "none", stroke: colour(run), opacity: 0.25 });
      node("path", svg, { d: path(points), fill: "none", stroke: colour(run), "stroke-width": 1.8, "stroke-dasharray": dash(run) });
      if (points.length < 30) for (const p of points) node("circle", svg, { cx: px(p[0]), cy: py(p[1]), r: 2.4, fill: colour(run) });
    }
    const cursor = node("line", svg, { y1: TOP, y2: H - BOTTOM, stroke: "var(--soft)", visibility: "hidden" });
    const chosen = node("rect", svg, { y: TOP, height: H - TOP - BOTTOM, fill: "var(--s2)", opacity: 0.2, visibility: "hidden" });
    const step = (event) => {
      const at = svg.getBoundingClientRect();
      return Math.min(x1, Math.max(x0, x0 + ((((event.clientX - at.left) / at.width) * W - LEFT) / (W - LEFT - RIGHT)) * (x1 - x0)));
    };
    const told = box.nextElementSibling;
    let from = null;
    svg.addEventListener("pointerdown", (event) => {
      from = step(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      const x = step(event);
      cursor.setAttribute("x1", px(x));
      cursor.setAttribute("x2", px(x));
      cursor.setAttribute("visibility", "visible");
      told.textContent = lines.map(([run, , points]) => {
        const near = points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
        return `${runs.length > 1 ? `${run}: ` : ""}${number(near[1])} at step ${near[0]}`;
      }).join(" · ");
      if (from === null) return;
      chosen.setAttribute("x", px(Math.min(from, x)));
      chosen.setAttribute("width", Math.abs(px(x) - px(from)));
      chosen.setAttribute("visibility", "visible");
    });
    svg.addEventListener("pointerup", (event) => {
      const x = step(event), wide = from !== null && Math.abs(px(x) - px(from)) > 8;
      if (wide) zoom([Math.min(from, x), Math.max(from, x)]);
      from = null;
    });
    svg.addEventListener("dblclick", () => zoom(null));
  }

  function zoom(to) {
    range = to;
    show();
  }

  const boxes = new Map(Object.keys(curves).map((metric) => {
    const figure = document.createElement("figure"), box = document.createElement("div"), told = document.createElement("figcaption");
    figure.className = "chart";
    const title = document.createElement("h3");
    title.textContent = metric;
    figure.append(title, box, told);
    charts.append(figure);
    return [metric, [figure, box]];
  }));
  // A run of hundreds of metrics is drawn where it is looked at.
  const watched = new IntersectionObserver((seen) => seen.forEach(({ target, isIntersecting }) => {
    target.inSight = isIntersecting;
    if (isIntersecting && target.stale) redraw(target);
  }), { rootMargin: "400px" });

  function redraw(figure) {
    const [metric, [, box]] = [...boxes].find(([, pair]) => pair[0] === figure);
    figure.stale = false;
    draw(metric, box);
  }

  function show() {
    const words = controls.find.value.toLowerCase();
    let kept = 0;
    for (const [metric, [figure]] of boxes) {
      figure.hidden = !metric.toLowerCase().includes(words);
      kept += !figure.hidden;
      figure.stale = true;
      if (figure.inSight && !figure.hidden) redraw(figure);
    }
    controls.querySelector("output").textContent = `${kept} of ${boxes.size} metrics${range ? `, steps ${Math.round(range[0])} to ${Math.round(range[1])}` : ""}`;
  }

  for (const run of runs) {
    const line = document.createElement("li");
    const svg = node("svg", line, { viewBox: "0 0 30 8", width: 30, height: 8, "aria-hidden": "true" });
    node("line", svg, { x1: 0, x2: 30, y1: 4, y2: 4, stroke: colour(run), "stroke-width": 3, "stroke-dasharray": dash(run) });
    line.append(run);
    document.getElementById("legend").append(line);
  }
  controls.addEventListener("input", show);
  controls.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("keydown", (event) => event.key === "Escape" && zoom(null));
  for (const [figure] of boxes.values()) watched.observe(figure);
  show();

  for (const grids of document.querySelectorAll(".grids")) {
    const slider = grids.querySelector("input"), told = grids.querySelector("output"), figures = [...grids.querySelectorAll("figure")];
    const turn = () => figures.forEach((figure, i) => {
      figure.hidden = i !== Number(slider.value);
      if (!figure.hidden) told.textContent = figure.dataset.step;
    });
    slider.addEventListener("input", turn);
    turn();
  }
})();
