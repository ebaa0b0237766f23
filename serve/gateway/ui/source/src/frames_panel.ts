/** The list of frames, and how far each is. */

import { byId, make } from "./dom";
import { Entry } from "./session";

const WORDS: Record<Entry["state"], string> = { waiting: "waits", running: "sent", done: "", failed: "error" };

export class FramesPanel {
  onChoose: (entry: Entry) => void = () => {};
  onSendFailed: () => void = () => {};
  private readonly list = byId("frames");
  private readonly buttons = new Map<Entry, HTMLButtonElement>();
  private readonly again = byId("send-failed");

  constructor() {
    this.again.addEventListener("click", () => this.onSendFailed());
  }

  show(entries: Entry[]): void {
    this.buttons.clear();
    this.list.replaceChildren(
      ...entries.map((entry) => {
        const button = make(
          "button",
          { type: "button", title: entry.frame.name },
          make("span", { className: "name" }, entry.frame.name),
          make("span", { className: "state" }),
        );
        button.addEventListener("click", () => this.onChoose(entry));
        this.buttons.set(entry, button);
        this.update(entry);
        return make("li", {}, button);
      }),
    );
  }

  /** Say which files of a folder are no frames. */
  showLeftOut(paths: string[]): void {
    const note = byId("left-out");
    note.textContent = paths.length ? `${paths.length} file${paths.length === 1 ? "" : "s"} of other kinds left out` : "";
    note.title = paths.slice(0, 20).join("\n");
  }

  /** Offer to send those once more that failed. */
  showFailed(count: number): void {
    this.again.hidden = !count;
    this.again.textContent = `Send ${count} failed frame${count === 1 ? "" : "s"} again`;
  }

  update(entry: Entry): void {
    const button = this.buttons.get(entry);
    if (!button) return;
    button.dataset.state = entry.state;
    button.lastElementChild!.textContent =
      entry.state === "done" && entry.timing ? `${Math.round(entry.timing.total)} ms` : WORDS[entry.state];
  }

  setCurrent(current: Entry | null): void {
    for (const [entry, button] of this.buttons) {
      if (entry === current) {
        button.setAttribute("aria-current", "true");
        button.scrollIntoView({ block: "nearest" });
      } else button.removeAttribute("aria-current");
    }
  }
}
