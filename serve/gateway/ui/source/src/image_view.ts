/** Images of a frame, side by side, with boxes, masks and segments; 3D boxes by the frame's calibration. */

import { Calibration } from "./calibration";
import { Detection, nameOf, scoreOf } from "./detections";
import { cornersOf, EDGES, headingOf, projectLine } from "./geometry";
import { drawChips, Label, prepare } from "./labels";
import { Layers } from "./layers";
import { SegmentMap } from "./masks";
import { BoxKind } from "./model";
import { classColour, css } from "./palette";

export interface Picture {
  /** Name of the camera, "" of the only one. */
  camera: string;
  bitmap: ImageBitmap;
}

export interface Overlay {
  detections: Detection[];
  selected: Detection | null;
  kind: BoxKind;
  calibration: Calibration | null;
  segments: SegmentMap | null;
  hidden: Set<string>;
}

export class ImageView {
  onPick: (detection: Detection | null) => void = () => {};
  showLabels = true;
  private pictures: Picture[] = [];
  private overlay: Overlay | null = null;
  private readonly layers = new Layers();
  private zoomed = 1;
  private shift: [number, number] = [0, 0];
  private isDue = false;

  constructor(readonly canvas: HTMLCanvasElement) {
    new ResizeObserver(() => this.redraw()).observe(canvas.parentElement!);
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    });
    let last: [number, number] | null = null;
    let moved = 0;
    canvas.addEventListener("pointerdown", (event) => {
      last = [event.clientX, event.clientY];
      moved = 0;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const [x, y] = [event.clientX - last[0], event.clientY - last[1]];
      moved += Math.hypot(x, y);
      last = [event.clientX, event.clientY];
      this.move(x, y);
    });
    canvas.addEventListener("pointerup", (event) => {
      last = null;
      if (moved < 4) this.onPick(this.pick(event.offsetX, event.offsetY));
    });
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  setPictures(pictures: Picture[]): void {
    const isSame = pictures.length === this.pictures.length;
    this.pictures = pictures;
    if (!isSame) this.reset();
    this.redraw();
  }

  setOverlay(overlay: Overlay): void {
    this.overlay = overlay;
    this.redraw();
    void this.prepare(overlay).then(() => this.redraw());
  }

  /** Decode the masks and segments of an overlay; one that is prepared is drawn at once. */
  async prepare({ detections, segments, hidden }: Overlay): Promise<void> {
    await this.layers.prepare(detections, segments, hidden);
  }

  reset(): void {
    this.zoomed = 1;
    this.shift = [0, 0];
    this.redraw();
  }

  /** Zoom about a pixel of the canvas. */
  zoom(factor: number, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2): void {
    const next = Math.min(Math.max(this.zoomed * factor, 1), 40);
    this.shift = [x - ((x - this.shift[0]) * next) / this.zoomed, y - ((y - this.shift[1]) * next) / this.zoomed];
    this.zoomed = next;
    if (next === 1) this.shift = [0, 0];
    this.redraw();
  }

  redraw(): void {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => this.render());
  }

  render(): void {
    this.isDue = false;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const context = prepare(this.canvas, width, height);
    for (const tile of this.tiles()) {
      context.drawImage(tile.picture.bitmap, tile.left, tile.top, tile.width, tile.height);
      if (this.overlay) this.drawOverlay(context, tile, this.overlay);
      if (tile.picture.camera) {
        context.font = "12px system-ui, sans-serif";
        context.fillStyle = "#e6edf3";
        context.fillText(tile.picture.camera, tile.left + 6, tile.top + 14);
      }
    }
  }

  private tiles(): Tile[] {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const count = this.pictures.length;
    const columns = count > 1 ? Math.ceil(Math.sqrt((count * width) / height / 1.6)) : 1;
    const rows = Math.ceil(count / columns);
    return this.pictures.map((picture, k) => {
      const [wide, high] = [width / columns, height / rows];
      const scale = Math.min(wide / picture.bitmap.width, high / picture.bitmap.height);
      const [w, h] = [picture.bitmap.width * scale, picture.bitmap.height * scale];
      const left = (k % columns) * wide + (wide - w) / 2;
      const top = Math.floor(k / columns) * high + (high - h) / 2;
      return {
        picture,
        left: left * this.zoomed + this.shift[0],
        top: top * this.zoomed + this.shift[1],
        width: w * this.zoomed,
        height: h * this.zoomed,
        scale: scale * this.zoomed,
      };
    });
  }

  private drawOverlay(context: CanvasRenderingContext2D, tile: Tile, overlay: Overlay): void {
    context.globalAlpha = 0.5;
    for (const detection of overlay.detections) {
      const layer = this.layers.maskOf(detection);
      if (!layer) continue;
      const [x, y] = [tile.left + layer.left * tile.scale, tile.top + layer.top * tile.scale];
      context.drawImage(layer.bitmap, x, y, layer.width * tile.scale, layer.height * tile.scale);
    }
    const map = overlay.segments && this.layers.mapOf(overlay.segments);
    if (map) context.drawImage(map, tile.left, tile.top, tile.width, tile.height);
    context.globalAlpha = 1;
    const labels: Label[] = [];
    for (const detection of [...overlay.detections].reverse()) {
      const lines = this.linesOf(detection, tile, overlay);
      if (!lines.length) continue;
      const isBold = detection === overlay.selected;
      context.beginPath();
      for (const line of lines) line.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.lineWidth = isBold ? 6 : 4;
      context.strokeStyle = "rgb(0 0 0 / 0.7)";
      context.stroke();
      context.lineWidth = isBold ? 4 : 2;
      context.strokeStyle = css(classColour(detection.label));
      context.stroke();
      const pixels = lines.flat();
      const x = (Math.min(...pixels.map((p) => p[0])) + Math.max(...pixels.map((p) => p[0]))) / 2;
      const y = Math.max(Math.min(...pixels.map((p) => p[1])) - 2, tile.top + 18);
      const text = `${nameOf(detection)} ${scoreOf(detection)}`;
      labels.unshift({ x, y, text, colour: classColour(detection.label), isBold });
    }
    if (this.showLabels) drawChips(context, labels, this.canvas.clientWidth, this.canvas.clientHeight);
  }

  /** The lines of a box in pixels of the canvas; none if the camera does not see it. */
  private linesOf(detection: Detection, tile: Tile, overlay: Overlay): [number, number][][] {
    const place = ([u, v]: number[]): [number, number] => [tile.left + u * tile.scale, tile.top + v * tile.scale];
    if (detection.box2d) {
      const [x1, y1, x2, y2] = detection.box2d;
      return [[[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]].map(place)];
    }
    const matrix = overlay.calibration?.projection(overlay.kind, tile.picture.camera);
    if (!detection.box3d || !matrix) return [];
    const corners = cornersOf(detection.box3d, overlay.kind);
    const edges = EDGES.map(([i, j]) => projectLine(matrix, corners[i], corners[j])).filter((line) => line !== null);
    const { width, height } = tile.picture.bitmap;
    const isSeen = edges.flat().some(([u, v]) => u >= 0 && u < width && v >= 0 && v < height);
    if (!isSeen) return [];
    const heading = projectLine(matrix, ...headingOf(detection.box3d, overlay.kind));
    return [...edges, ...(heading ? [heading] : [])].map((line) => line.map(place));
  }

  private pick(x: number, y: number): Detection | null {
    for (const tile of this.tiles()) {
      let best: Detection | null = null;
      let least = Infinity;
      for (const detection of this.overlay?.detections ?? []) {
        const pixels = this.linesOf(detection, tile, this.overlay!).flat();
        if (!pixels.length) continue;
        const [xs, ys] = [pixels.map((pixel) => pixel[0]), pixels.map((pixel) => pixel[1])];
        const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
        const area = (right - left) * (bottom - top);
        const isInside = left <= x && x <= right && top <= y && y <= bottom;
        if (isInside && area < least) [best, least] = [detection, area];
      }
      if (best) return best;
    }
    return null;
  }

  private move(x: number, y: number): void {
    if (this.zoomed === 1) return;
    this.shift = [this.shift[0] + x, this.shift[1] + y];
    this.redraw();
  }

  private onKey(event: KeyboardEvent): void {
    const arrows: Record<string, [number, number]> = {
      ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40],
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (arrows[event.key]) this.move(...arrows[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoom(1.25);
    else if (event.key === "-") this.zoom(1 / 1.25);
    else return;
    event.preventDefault();
  }
}

interface Tile {
  picture: Picture;
  left: number;
  top: number;
  width: number;
  height: number;
  scale: number;
}
