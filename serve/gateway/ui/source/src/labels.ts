/** Names beside boxes, on a 2D canvas over the picture; those that would cover another one are left out. */

import { css, Rgb } from "./palette";

export interface Label {
  x: number;
  y: number;
  text: string;
  colour: Rgb;
  isBold: boolean;
}

const FONT = "12px system-ui, sans-serif";
const MOST = 80;

/** Fit a canvas to its size in CSS pixels and the screen's, and clear it. */
export function prepare(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const ratio = Math.min(devicePixelRatio, 2);
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d")!;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

export function drawLabels(canvas: HTMLCanvasElement, labels: Label[], width: number, height: number): void {
  drawChips(prepare(canvas, width, height), labels, width, height);
}

/** Draw labels centred above their points; bold ones, then earlier ones, go first. */
export function drawChips(context: CanvasRenderingContext2D, labels: Label[], width: number, height: number): void {
  const taken: [number, number, number, number][] = [];
  context.textBaseline = "middle";
  const ordered = [...labels.filter((label) => label.isBold), ...labels.filter((label) => !label.isBold)];
  for (const { x, y, text, colour, isBold } of ordered.slice(0, MOST)) {
    context.font = isBold ? `bold ${FONT}` : FONT;
    const wide = context.measureText(text).width + 10;
    const [left, top] = [x - wide / 2, y - 18];
    const isOutside = left + wide < 0 || left > width || top + 18 < 0 || top > height;
    const isCovering = taken.some(([l, t, r, b]) => left < r && left + wide > l && top < b && top + 18 > t);
    if (isOutside || (isCovering && !isBold)) continue;
    taken.push([left, top, left + wide, top + 18]);
    context.fillStyle = "rgb(11 15 20 / 0.82)";
    context.beginPath();
    context.roundRect(left, top, wide, 18, 4);
    context.fill();
    context.fillStyle = css(colour);
    context.fillText(text, left + 5, top + 9.5);
  }
}
