/** Answers as a JSON file, and the picture of the present frame as a PNG. */

import { CloudView } from "./cloud_view";
import { ImageView } from "./image_view";
import { Model, PageError } from "./model";
import { Entry } from "./session";

/** One answer as the server sent it, of several frames a list with their names; errors stand in place of answers. */
export function answersAsJson(model: Model | null, entries: Entry[]): Blob {
  const one = (entry: Entry): unknown => entry.answer ?? { error: entry.error ?? entry.state };
  const document =
    entries.length === 1
      ? one(entries[0])
      : {
          model: model && { name: model.name, version: model.version },
          frames: entries.map((entry) => ({ name: entry.frame.name, answer: entry.answer, error: entry.error })),
        };
  return new Blob([JSON.stringify(document, null, 1)], { type: "application/json" });
}

/**
 * The views as they are seen: where they are on the page, and on its ground.
 *
 * @throws PageError if no view is shown.
 */
export async function viewsAsPng(cloudView: CloudView | null, imageView: ImageView, root: HTMLElement): Promise<Blob> {
  const shown = [...root.querySelectorAll("canvas")].filter((canvas) => canvas.clientWidth && canvas.clientHeight);
  if (!cloudView && !shown.includes(imageView.canvas)) shown.length = 0;
  if (!shown.length) {
    throw new PageError("no view of this frame is shown, so that there is no picture to save; Save JSON saves its answer", "no_view");
  }
  cloudView?.render();
  imageView.render();
  const bounds = root.getBoundingClientRect();
  const ratio = Math.min(devicePixelRatio, 2);
  const whole = new OffscreenCanvas(Math.round(bounds.width * ratio), Math.round(bounds.height * ratio));
  const context = whole.getContext("2d")!;
  context.fillStyle = getComputedStyle(shown[0].parentElement!).backgroundColor;
  context.fillRect(0, 0, whole.width, whole.height);
  for (const canvas of shown) {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    context.drawImage(canvas, (left - bounds.left) * ratio, (top - bounds.top) * ratio, width * ratio, height * ratio);
  }
  return whole.convertToBlob({ type: "image/png" });
}

export function save(blob: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
