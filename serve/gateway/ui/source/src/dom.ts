/** Elements of the page by their id, and small ones made anew. */

export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`index.html lacks #${id}`);
  return found as T;
}

export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  properties: Partial<HTMLElementTagNameMap[K]> = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function swatch(colour: string): HTMLElement {
  const made = make("span", { className: "swatch" });
  made.style.background = colour;
  return made;
}

/** Tell a screen reader, politely. */
export function announce(text: string): void {
  byId("status").textContent = text;
}

/** Show errors until they are closed. */
export function showError(text: string): void {
  const close = make("button", { type: "button", textContent: "Close" });
  const shown = make("p", {}, make("span", {}, text), close);
  close.addEventListener("click", () => shown.remove());
  const errors = byId("errors");
  errors.append(shown);
  while (errors.children.length > 3) errors.firstElementChild!.remove();
}

export function clearErrors(): void {
  byId("errors").replaceChildren();
}
