// Builds the page's assets: node build.mjs OUT. Long scripts and styles are stored compressed, and sent so.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";
import { join } from "node:path";

const out = process.argv[2];
const LONG_BYTES = 4096;

const bundled = await build({
  entryPoints: ["src/main.ts", "src/docs.ts"],
  entryNames: "[name]",
  outdir: "out",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "none",
  write: false,
});
const assets = new Map();
for (const { path, contents } of bundled.outputFiles) {
  assets.set(path.endsWith("main.js") ? "page.js" : "docs.js", Buffer.from(contents));
}
for (const name of readdirSync("static")) assets.set(name, readFileSync(join("static", name)));
for (const name of ["swagger-ui-bundle.js", "swagger-ui.css"]) {
  // Its maps are not shipped.
  const text = readFileSync(join("node_modules/swagger-ui-dist", name), "utf8");
  assets.set(name, Buffer.from(text.replace(/\n?(\/\/|\/\*)# sourceMappingURL=\S+( \*\/)?\s*$/, "\n")));
}
const texts = ["LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt"].map((name) => `swagger-ui-dist/${name}`);
const licences = ["three/LICENSE", ...texts].map(
  (path) => `${path}\n\n${readFileSync(join("node_modules", path), "utf8").trim()}\n`,
);
assets.set("licences.txt", Buffer.from(licences.join(`\n${"-".repeat(80)}\n\n`)));

rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
for (const [name, content] of assets) {
  const isLong = content.length > LONG_BYTES && !name.endsWith(".html");
  writeFileSync(join(out, isLong ? `${name}.gz` : name), isLong ? gzipSync(content, { level: 9 }) : content);
}

// The digest of all sources, by which a test notices assets that are not built of them.
function sources(folder) {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    if (entry.name === "node_modules") return [];
    const path = folder === "." ? entry.name : `${folder}/${entry.name}`;
    return entry.isDirectory() ? sources(path) : [path];
  });
}
const digest = createHash("sha256");
for (const path of sources(".").sort()) {
  digest.update(`${path}\n`).update(createHash("sha256").update(readFileSync(path)).digest());
}
writeFileSync(join(out, "sources.sha256"), `${digest.digest("hex")}\n`);
