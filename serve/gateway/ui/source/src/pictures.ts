/** Image files to pixels, turned as the model sees them. */

import { decodeImage } from "./api";

/** Decode an image; what no browser decodes, or this one turns otherwise than the model's decoder, the server decodes. */
export async function decodePicture(file: File): Promise<ImageBitmap> {
  const head = new Uint8Array(await file.slice(0, 32).arrayBuffer());
  if (!isTurnedOtherwise(head)) {
    try {
      return await createImageBitmap(file);
    } catch {
      // The server knows more formats, and says what is wrong with the others.
    }
  }
  return createImageBitmap(await decodeImage(file));
}

/**
 * OpenCV turns a WebP by its EXIF and leaves an AVIF as it is stored; browsers do the opposite. Both turn JPEG and PNG.
 * (A WebP has EXIF if bit 3 of its VP8X flags is set: RFC 9649, 2.7.)
 */
function isTurnedOtherwise(head: Uint8Array): boolean {
  const text = String.fromCharCode(...head);
  return /^[^]{4}ftyp(avif|avis|mif1)/.test(text) || (/^RIFF[^]{4}WEBPVP8X/.test(text) && (head[20] & 8) !== 0);
}
