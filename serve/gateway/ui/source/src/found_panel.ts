/** The panel of an answer: score, classes, warnings and the table of detections. */

import { Detection, Filter, isShown, nameOf, scoreOf } from "./detections";
import { byId, make, swatch } from "./dom";
import { classColour, css } from "./palette";
import { Maps } from "./masks";
import { Entry } from "./session";

const MOST_ROWS = 200;

export class FoundPanel {
  readonly filter: Filter = { minScore: 0.3, hidden: new Set() };
  /** Called when the user changed the filter. */
  onFilter: () => void = () => {};
  /** Called when the user chose a row. */
  onSelect: (detection: Detection) => void = () => {};
  private readonly slider = byId<HTMLInputElement>("min-score");
  private readonly classes = byId("classes").querySelector("div")!;
  private readonly rows = byId("found").querySelector("tbody")!;
  private listed = "";

  constructor() {
    this.slider.addEventListener("input", () => {
      this.filter.minScore = this.slider.valueAsNumber;
      byId("min-score-text").textContent = this.filter.minScore.toFixed(2);
      this.onFilter();
    });
  }

  show(entry: Entry, maps: Maps, info: string, selected: Detection | null): void {
    byId("frame-info").textContent = info;
    byId("warnings").replaceChildren(...(entry.answer?.warnings ?? []).map(({ message }) => make("li", {}, message)));
    this.listClasses(entry, maps);
    const shown = entry.detections.filter((each) => isShown(each, this.filter));
    const segments = (maps.segments?.segments ?? []).filter(({ name }) => !this.filter.hidden.has(name));
    byId("found-title").textContent = entry.answer
      ? `Detections: ${segments.length || shown.length} of ${entry.detections.length || maps.segments?.segments.length || 0}`
      : "Detections";
    this.rows.replaceChildren(
      ...shown.slice(0, MOST_ROWS).map((each) => this.row(each, each === selected)),
      ...(shown.length > MOST_ROWS ? [restRow(shown.length - MOST_ROWS)] : []),
      ...segments.map(({ name, category_id, area }) =>
        make("tr", {}, make("th", { scope: "row" }, swatch(css(classColour(category_id))), ` ${name}`), make("td"),
          make("td", {}, `${area.toLocaleString("en")} pixels`)),
      ),
    );
  }

  /** Offer the classes that occur in the answer, with their numbers. */
  private listClasses(entry: Entry, maps: Maps): void {
    const counts = new Map<string, [number, number]>();
    const add = (name: string, label: number, count = 1): void => {
      counts.set(name, [label, (counts.get(name)?.[1] ?? 0) + count]);
    };
    for (const { name, label, score } of entry.detections) add(name, label, score < this.filter.minScore ? 0 : 1);
    for (const { name, category_id } of maps.segments?.segments ?? []) add(name, category_id);
    const named = entry.answer?.classes ?? [];
    for (const [label, count] of countLabels(maps.pointLabels)) add(named[label] ?? String(label), label, count);
    const listed = JSON.stringify([...counts]);
    if (listed === this.listed) return;
    const focused = (document.activeElement as HTMLInputElement | null)?.value;
    const isInside = this.classes.contains(document.activeElement);
    this.listed = listed;
    this.classes.replaceChildren(
      ...[...counts].map(([name, [label, count]]) => {
        const box = make("input", { type: "checkbox", checked: !this.filter.hidden.has(name), value: name });
        box.addEventListener("change", () => {
          if (box.checked) this.filter.hidden.delete(name);
          else this.filter.hidden.add(name);
          this.onFilter();
        });
        return make("label", {}, box, swatch(css(classColour(label))), `${name} (${count.toLocaleString("en")})`);
      }),
    );
    if (isInside) [...this.classes.querySelectorAll("input")].find((box) => box.value === focused)?.focus();
  }

  private row(detection: Detection, isSelected: boolean): HTMLTableRowElement {
    const { label, box3d, box2d } = detection;
    const button = make("button", { type: "button" }, swatch(css(classColour(label))), nameOf(detection));
    button.setAttribute("aria-pressed", String(isSelected));
    button.addEventListener("click", () => this.onSelect(detection));
    const place = box3d
      ? `${box3d.slice(0, 3).map((value) => value.toFixed(1)).join(", ")} m`
      : (box2d ?? []).map((value) => Math.round(value)).join(", ") || "–";
    const row = make("tr", {}, make("th", { scope: "row" }, button), make("td", {}, scoreOf(detection)), make("td", {}, place));
    row.dataset.selected = String(isSelected);
    return row;
  }
}

/** Says how many detections have no row: that many buttons make a browser slow. */
function restRow(count: number): HTMLTableRowElement {
  const text = `${count.toLocaleString("en")} more are drawn and saved, and not listed; raise the score to see fewer`;
  return make("tr", {}, make("td", { colSpan: 3 }, text));
}

function countLabels(labels: ArrayLike<number> | null): Map<number, number> {
  const counts = new Map<number, number>();
  for (let k = 0; k < (labels?.length ?? 0); k++) counts.set(labels![k], (counts.get(labels![k]) ?? 0) + 1);
  return counts;
}
