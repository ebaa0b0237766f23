/** Masks and segments as images that are laid over a picture: those of the last frames, within a bound. */

import { Detection } from "./detections";
import { decodeMask, Mask, SegmentMap } from "./masks";
import { classColour, Rgb } from "./palette";

/** Of masks, 4 bytes each; more only if one frame has more. */
const MOST_PIXELS = 16_000_000;
/** Maps of segments: of the shown frame, and of the next one. */
const MOST_MAPS = 2;

export type Layer = Omit<Mask, "ones"> & { bitmap: ImageBitmap };

export class Layers {
  private readonly masks = new Map<Detection, Layer>();
  private readonly maps = new Map<SegmentMap, { hidden: string; bitmap: ImageBitmap }>();

  maskOf(detection: Detection): Layer | undefined {
    return this.masks.get(detection);
  }

  mapOf(segments: SegmentMap): ImageBitmap | undefined {
    return this.maps.get(segments)?.bitmap;
  }

  /** Make the layers of these that are missing, and those of a map in which other names are hidden. */
  async prepare(detections: Detection[], segments: SegmentMap | null, hidden: Set<string>): Promise<void> {
    for (const detection of detections) if (detection.mask) await this.addMask(detection);
    this.dropMasks(new Set(detections));
    if (segments) await this.addMap(segments, hidden);
  }

  private async addMask(detection: Detection): Promise<void> {
    const known = this.masks.get(detection);
    const mask = known ? null : decodeMask(detection.mask!);
    if (mask) {
      const { ones, ...place } = mask;
      const bitmap = await layerOf(place.width, place.height, [null, classColour(detection.label)], ones);
      this.set(this.masks, detection, { ...place, bitmap });
    } else if (known) {
      this.masks.delete(detection);
      this.masks.set(detection, known);
    }
  }

  /** Drop those that were used longest ago. */
  private dropMasks(kept: Set<Detection>): void {
    let pixels = 0;
    for (const { width, height } of this.masks.values()) pixels += width * height;
    for (const [detection, { width, height }] of this.masks) {
      if (pixels <= MOST_PIXELS || kept.has(detection)) return;
      pixels -= width * height;
      this.remove(this.masks, detection);
    }
  }

  private async addMap(segments: SegmentMap, hiddenNames: Set<string>): Promise<void> {
    const hidden = JSON.stringify([...hiddenNames].sort());
    if (this.maps.get(segments)?.hidden === hidden) return;
    const colours = segments.segments.map(({ name, category_id }) => (hiddenNames.has(name) ? null : classColour(category_id)));
    // The last colour is that of -1.
    const bitmap = await layerOf(segments.width, segments.height, [...colours, null], segments.indices);
    this.set(this.maps, segments, { hidden, bitmap });
    for (const old of this.maps.keys()) {
      if (this.maps.size <= MOST_MAPS) return;
      this.remove(this.maps, old);
    }
  }

  private set<K, V extends { bitmap: ImageBitmap }>(map: Map<K, V>, key: K, value: V): void {
    this.remove(map, key);
    map.set(key, value);
  }

  private remove<K, V extends { bitmap: ImageBitmap }>(map: Map<K, V>, key: K): void {
    map.get(key)?.bitmap.close();
    map.delete(key);
  }
}

/** An image whose pixels have the colour of their index (from the end if it is negative); null is transparent. */
function layerOf(width: number, height: number, colours: (Rgb | null)[], indices: ArrayLike<number>): Promise<ImageBitmap> {
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const packed = new Uint32Array(colours.map((colour) => (colour ? new Uint32Array(Uint8Array.of(...colour, 255).buffer)[0] : 0)));
  for (let k = 0; k < pixels.length; k++) pixels[k] = packed[indices[k] < 0 ? packed.length + indices[k] : indices[k]];
  return createImageBitmap(image);
}
