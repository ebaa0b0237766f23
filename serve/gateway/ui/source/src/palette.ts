/** Colours: those of classes are the ones of the pictures that the server draws (serve/visualize/canvas.py). */

export type Rgb = [number, number, number];

const CLASSES: Rgb[] = [
  [255, 159, 67], [255, 92, 150], [124, 226, 110], [86, 196, 255], [250, 220, 64], [190, 140, 255],
  [255, 110, 86], [60, 226, 190], [255, 160, 214], [250, 206, 150], [170, 190, 120], [230, 230, 230],
];

/** Stops from low to high, dark to bright, readable on a dark ground and without telling red from green. */
const RAMP: Rgb[] = [
  [84, 118, 190], [66, 140, 196], [52, 160, 178], [60, 184, 150], [112, 204, 110], [178, 222, 74], [253, 231, 60],
];

export function classColour(label: number): Rgb {
  return CLASSES[((label % CLASSES.length) + CLASSES.length) % CLASSES.length];
}

export function css([red, green, blue]: Rgb, alpha = 1): string {
  return `rgb(${red} ${green} ${blue} / ${alpha})`;
}

/** Colour at `share` of the ramp, 0 to 1. */
export function rampColour(share: number): Rgb {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((value, k) => value + (RAMP[low + 1][k] - value) * (at - low)) as Rgb;
}

/** 256 texels of RGBA: the ramp. */
export function rampTexels(): Uint8Array {
  return texels((k) => rampColour(k / 255));
}

/** Labels from which on the texels of classes are those from 0 on again. */
export const CLASS_TEXELS = 256 - (256 % CLASSES.length);

/** 256 texels of RGBA: the colour of each class. */
export function classTexels(): Uint8Array {
  return texels(classColour);
}

function texels(colour: (k: number) => Rgb): Uint8Array {
  const found = new Uint8Array(256 * 4);
  for (let k = 0; k < 256; k++) found.set([...colour(k), 255], 4 * k);
  return found;
}
