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
 * The views as they are seen, side by side.
 *
 * @throws PageError if no view is shown.
 */
export async function viewsAsPng(cloudView: CloudView | null, imageView: ImageView, views: string): Promise<Blob> {
  const layers: HTMLCanvasElement[][] = [];
  if (views.includes("cloud") && cloudView) {
    cloudView.render();
    layers.push([cloudView.canvas, cloudView.canvas.parentElement!.querySelector<HTMLCanvasElement>("#cloud-labels")!]);
  }
  if (views.includes("images")) {
    imageView.render();
    layers.push([imageView.canvas]);
  }
  if (!layers.length) {
    throw new PageError("no view of this frame is shown, so that there is no picture to save; Save JSON saves its answer", "no_view");
  }
  const whole = new OffscreenCanvas(
    layers.reduce((sum, [first]) => sum + first.width, 0),
    Math.max(...layers.map(([first]) => first.height)),
  );
  const context = whole.getContext("2d")!;
  let left = 0;
  for (const canvases of layers) {
    for (const canvas of canvases) context.drawImage(canvas, left, 0, canvases[0].width, canvases[0].height);
    left += canvases[0].width;
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
