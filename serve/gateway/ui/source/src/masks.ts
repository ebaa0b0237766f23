/** Masks of COCO run lengths, labels of points and panoptic maps. */

import { Answer, RunLengths, Segment } from "./model";

/** What an answer says of every pixel or point: large once decoded, so that only those of the shown frame are kept. */
export interface Maps {
  segments: SegmentMap | null;
  pointLabels: ArrayLike<number> | null;
}

export const NO_MAPS: Maps = { segments: null, pointLabels: null };

export async function decodeMaps(answer: Answer | undefined): Promise<Maps> {
  if (!answer) return NO_MAPS;
  const { pts_semantic_mask } = answer;
  return {
    segments: await decodeSegments(answer),
    pointLabels: pts_semantic_mask ? decodePointLabels(pts_semantic_mask) : null,
  };
}

/** Run lengths as numbers; the text form is COCO's own base-48 code (pycocotools, maskApi.c). */
export function readCounts(counts: string | number[]): number[] {
  if (typeof counts !== "string") return counts;
  const found: number[] = [];
  for (let at = 0; at < counts.length; ) {
    let value = 0;
    let shift = 0;
    let code: number;
    do {
      code = counts.charCodeAt(at++) - 48;
      value |= (code & 0x1f) << (5 * shift++);
    } while (code & 0x20);
    if (code & 0x10) value |= -1 << (5 * shift);
    found.push(found.length > 2 ? value + found[found.length - 2] : value);
  }
  return found;
}

export interface Mask {
  left: number;
  top: number;
  width: number;
  height: number;
  /** Row by row, ones within the mask. */
  ones: Uint8Array;
}

/** Decode a mask, cut to what it covers; null if that is nothing. */
export function decodeMask(mask: RunLengths): Mask | null {
  const height = mask.size[0];
  const runs: [number, number][] = [];
  let at = 0;
  readCounts(mask.counts).forEach((count, k) => {
    if (k % 2 && count) runs.push([at, at + count]);
    at += count;
  });
  if (!runs.length) return null;
  const left = Math.floor(runs[0][0] / height);
  const right = Math.floor((runs[runs.length - 1][1] - 1) / height);
  let [top, bottom] = [height - 1, 0];
  for (const [start, end] of runs) {
    const isWithinColumn = Math.floor(start / height) === Math.floor((end - 1) / height);
    top = isWithinColumn ? Math.min(top, start % height) : 0;
    bottom = isWithinColumn ? Math.max(bottom, (end - 1) % height) : height - 1;
  }
  const [width, high] = [right - left + 1, bottom - top + 1];
  const ones = new Uint8Array(width * high);
  for (const [start, end] of runs) {
    for (let k = start; k < end; k++) ones[((k % height) - top) * width + Math.floor(k / height) - left] = 1;
  }
  return { left, top, width, height: high, ones };
}

/** Labels of points, in the order of the cloud. */
function decodePointLabels(mask: NonNullable<Answer["pts_semantic_mask"]>): ArrayLike<number> {
  const bytes = Uint8Array.from(atob(mask.b64), (letter) => letter.charCodeAt(0));
  switch (mask.dtype) {
    case "uint8":
      return bytes;
    case "uint16":
      return new Uint16Array(bytes.buffer);
    case "int64":
      return Float64Array.from(new BigInt64Array(bytes.buffer), Number);
    default:
      return new Int32Array(bytes.buffer);
  }
}

export interface SegmentMap {
  width: number;
  height: number;
  /** Position in `segments` for each pixel, -1 of none. */
  indices: Int16Array;
  segments: Segment[];
}

/** Panoptic map: red + 256 green + 65536 blue of a pixel is the id of its segment. */
async function decodeSegments(answer: Answer): Promise<SegmentMap | null> {
  if (!answer.panoptic_seg) return null;
  const bytes = Uint8Array.from(atob(answer.panoptic_seg.png_b64), (letter) => letter.charCodeAt(0));
  // Ids are numbers, not colours: nothing may convert them.
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }), {
    colorSpaceConversion: "none",
    premultiplyAlpha: "none",
  });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d")!;
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  bitmap.close();
  const segments = answer.segments_info ?? [];
  const position = new Map(segments.map((segment, k) => [segment.id, k]));
  const indices = new Int16Array(canvas.width * canvas.height);
  for (let k = 0; k < indices.length; k++) {
    const id = data[4 * k] + 256 * data[4 * k + 1] + 65536 * data[4 * k + 2];
    indices[k] = position.get(id) ?? -1;
  }
  return { width: canvas.width, height: canvas.height, indices, segments };
}
