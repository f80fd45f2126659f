// The codes of an image as a grid, each shaded by a number, with a cursor that pointer and arrow keys move.

const DARK = [36, 30, 78], LIGHT = [255, 214, 102];

export class CodeGrid {
  constructor(canvas, readout) {
    this.canvas = canvas;
    this.readout = readout;
    canvas.addEventListener("pointermove", (event) => {
      if (!this.codes) return;
      const box = canvas.getBoundingClientRect();
      this.move(
        Math.floor(((event.clientY - box.top) / box.height) * this.codes.length),
        Math.floor(((event.clientX - box.left) / box.width) * this.codes[0].length),
      );
    });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step || !this.codes) return;
      event.preventDefault();
      this.move(this.y + step[0], this.x + step[1]);
    });
  }

  // codes [Y][X]; values of the same shape or null, which `unit` explains.
  show(codes, values, unit) {
    Object.assign(this, { codes, values, unit, y: 0, x: 0 });
    this.side = Math.max(4, Math.floor(720 / codes[0].length));
    this.canvas.width = codes[0].length * this.side;
    this.canvas.height = codes.length * this.side;
    const most = values ? Math.max(...values.flat(), 1e-6) : 1;
    const mean = values ? values.flat().reduce((a, b) => a + b, 0) / values.flat().length : 0;
    this.canvas.setAttribute("aria-label", `grid of ${codes.length} by ${codes[0].length} codes${values ? `, mean ${unit} ${mean.toFixed(2)}` : ""}`);
    this.most = most;
    this.draw();
    this.readout.textContent = values ? `${unit}: mean ${mean.toFixed(2)}, most ${most.toFixed(2)}` : `${codes.length} x ${codes[0].length} codes`;
  }

  draw() {
    const pen = this.canvas.getContext("2d"), s = this.side;
    this.codes.forEach((row, y) => row.forEach((code, x) => {
      const share = this.values ? Math.min(1, Math.max(0, this.values[y][x] / this.most)) : 0.15;
      pen.fillStyle = `rgb(${DARK.map((c, i) => Math.round(c + share * (LIGHT[i] - c))).join(" ")})`;
      pen.fillRect(x * s, y * s, s, s);
      if (s >= 40) {
        pen.fillStyle = share > 0.5 ? "#1c2430" : "#fff";
        pen.font = `${Math.floor(s / 3.6)}px system-ui, sans-serif`;
        pen.textAlign = "center";
        pen.textBaseline = "middle";
        pen.fillText(code, (x + 0.5) * s, (y + 0.5) * s);
      }
    }));
  }

  move(y, x) {
    this.y = Math.min(Math.max(y, 0), this.codes.length - 1);
    this.x = Math.min(Math.max(x, 0), this.codes[0].length - 1);
    this.draw();
    const pen = this.canvas.getContext("2d");
    pen.strokeStyle = "#ff5c1a";
    pen.lineWidth = Math.max(2, this.side / 12);
    pen.strokeRect(this.x * this.side + 1, this.y * this.side + 1, this.side - 2, this.side - 2);
    const value = this.values ? `, ${this.unit} ${this.values[this.y][this.x].toFixed(3)}` : "";
    this.readout.textContent = `row ${this.y + 1}, column ${this.x + 1}: code ${this.codes[this.y][this.x]}${value}`;
  }
}
