/** The API documentation: Swagger UI from the package, with the key (kept in memory) on every request. */

interface SwaggerRequest {
  headers: Record<string, string>;
}

declare const SwaggerUIBundle: (options: Record<string, unknown>) => unknown;

let key = "";

async function start(): Promise<void> {
  const address = new URL("openapi.json", document.baseURI).href;
  const answer = await fetch(address, { headers: key ? { "X-API-Key": key } : {}, credentials: "omit" });
  const form = document.getElementById("key-form")!;
  form.hidden = answer.status !== 401;
  if (!answer.ok) {
    const { error } = await answer.json();
    document.getElementById("key-message")!.textContent = error.message;
    return;
  }
  SwaggerUIBundle({
    // Below the prefix of a proxy, as everything else here.
    spec: { ...(await answer.json()), servers: [{ url: new URL(".", document.baseURI).pathname }] },
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
    requestInterceptor: (request: SwaggerRequest) => {
      if (key) request.headers["X-API-Key"] = key;
      return request;
    },
  });
}

document.getElementById("key-form")!.addEventListener("submit", (event) => {
  event.preventDefault();
  const field = document.getElementById("key") as HTMLInputElement;
  key = field.value.trim();
  field.value = "";
  void start();
});
void start();
