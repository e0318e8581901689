// Fifteen minutes of figures, one a second, and small curves of them.

const SECONDS = 900,
  LEAST_SECONDS = 120; // kept; and shown at least

export class History {
  constructor(names) {
    this.rings = Object.fromEntries(names.map(name => [name, []]));
  }

  push(name, value) {
    const ring = this.rings[name];
    ring.push(Number.isFinite(value) ? value : null);
    if (ring.length > SECONDS) ring.shift();
  }

  last(name) {
    return this.rings[name].at(-1) ?? null;
  }

  // least: the axis reaches at least to here.
  draw(canvas, name, least) {
    const scale = devicePixelRatio || 1,
      {clientWidth: width, clientHeight: height} = canvas;
    if (!width) return;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d"),
      style = getComputedStyle(canvas),
      ring = this.rings[name];
    pen.scale(scale, scale);
    const low = Math.min(0, ...ring.filter(v => v !== null)),
      top = Math.max(least, ...ring.filter(v => v !== null)) || 1;
    const shown = Math.max(LEAST_SECONDS, ring.length),
      x = i => width - ((ring.length - 1 - i) * width) / (shown - 1),
      y = value => height - 2 - ((value - low) / (top - low)) * (height - 4);
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.beginPath();
    pen.moveTo(0, y(0));
    pen.lineTo(width, y(0));
    pen.stroke();
    pen.strokeStyle = style.getPropertyValue("--accent");
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    pen.beginPath();
    let down = false;
    ring.forEach((value, i) => {
      if (value === null) {
        down = false;
        return;
      }
      down ? pen.lineTo(x(i), y(value)) : pen.moveTo(x(i), y(value));
      down = true;
    });
    pen.stroke();
  }
}
