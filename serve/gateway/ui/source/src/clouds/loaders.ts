/** PCD and PLY by three's loaders, which take what a header claims for what there is: that is checked before. */

import { BufferGeometry } from "three";
import { PCDLoader } from "three/examples/jsm/loaders/PCDLoader.js";
import { PLYLoader } from "three/examples/jsm/loaders/PLYLoader.js";
import { PageError } from "../model";
import { Cloud } from "./cloud";

/** Compressed PCD files that become larger than this are left to the server, which has bounds of its own. */
const MOST_UNPACKED_BYTES = 256 * 1024 ** 2;
const PLY_BYTES: Record<string, number> = {
  char: 1, int8: 1, uchar: 1, uint8: 1, short: 2, int16: 2, ushort: 2, uint16: 2,
  int: 4, int32: 4, uint: 4, uint32: 4, float: 4, float32: 4, double: 8, float64: 8,
};

/** Read a PCD whose header is within `head`, the beginning of the file, a letter for each byte. */
export function readPcd(buffer: ArrayBuffer, head: string): Cloud {
  checkPcd(buffer, head);
  return fromGeometry(new PCDLoader().parse(buffer).geometry);
}

function checkPcd(buffer: ArrayBuffer, head: string): void {
  const data = /^DATA +(\w+)\r?\n/m.exec(head);
  const numbers = (name: string): number[] =>
    (new RegExp(`^${name} +(.*)$`, "m").exec(head)?.[1] ?? "").trim().split(/\s+/).filter(Boolean).map(Number);
  const [sizes, counts] = [numbers("SIZE"), numbers("COUNT")];
  const [width = NaN, height = NaN] = [numbers("WIDTH")[0], numbers("HEIGHT")[0]];
  const points = numbers("POINTS")[0] ?? width * height;
  const stride = sizes.reduce((sum, size, k) => sum + size * (counts[k] ?? 1), 0);
  const start = data ? data.index + data[0].length : 0;
  let left = buffer.byteLength - start;
  if (data?.[1] === "binary_compressed" && left >= 8) {
    left = new DataView(buffer).getUint32(start + 4, true);
    if (left > MOST_UNPACKED_BYTES) throw new PageError(`the cloud has ${left} bytes unpacked`);
  }
  // In text a number has two bytes at the least.
  const least = data?.[1] === "ascii" ? 2 * sizes.length - 1 : stride;
  if (!data || !(points >= 0 && points * least <= left)) {
    throw new PageError(`the header claims ${points} points of ${least} bytes, ${left} bytes follow`);
  }
}

/** Read a PLY; `intensity` is the property that holds it, if there is one. */
export function readPly(buffer: ArrayBuffer, head: string, intensity: string | undefined): Cloud {
  checkPly(buffer, head);
  const loader = new PLYLoader();
  // A property that the file does not have would be read as not a number.
  if (intensity !== undefined) loader.setCustomPropertyNameMapping({ intensity: [intensity] });
  return fromGeometry(loader.parse(buffer));
}

function checkPly(buffer: ArrayBuffer, head: string): void {
  const end = /^end_header\r?\n/m.exec(head);
  if (!end) throw new PageError("the header has no end");
  const isText = /^format ascii /m.test(head);
  let least = 0;
  for (const element of head.slice(0, end.index).split(/^element /m).slice(1)) {
    const [name, count] = element.split(/\s+/);
    // Of a list at least its length is there.
    const kinds = [...element.matchAll(/^property (?:list (\w+) \w+|(\w+)) /gm)].map(([, length, kind]) => length ?? kind);
    const bytes = kinds.reduce((sum, kind) => sum + (isText ? 2 : PLY_BYTES[kind] ?? NaN), 0);
    if (!(Number(count) >= 0 && (bytes > 0 || count === "0"))) throw new PageError(`the element ${name} has no size`);
    least += Number(count) * bytes;
  }
  const left = buffer.byteLength - end.index - end[0].length;
  if (!(least <= left + 1)) throw new PageError(`the header claims at least ${least} bytes, ${left} follow`);
}

function fromGeometry(geometry: BufferGeometry): Cloud {
  const position = geometry.getAttribute("position");
  const intensity = geometry.getAttribute("intensity");
  const colour = geometry.getAttribute("color");
  return {
    count: position?.count ?? 0,
    positions: position ? new Float32Array(position.array) : new Float32Array(),
    intensity: intensity ? new Float32Array(intensity.array) : null,
    // The loaders turn colours of the file into linear ones; back to what was in it.
    colours: colour ? Uint8Array.from(colour.array, (value) => 255 * linearToSrgb(value)) : null,
  };
}

function linearToSrgb(value: number): number {
  return value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055;
}
