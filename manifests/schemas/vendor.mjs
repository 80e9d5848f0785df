// Writes the schemas beside it, from the TypeScript types of @kubernetes-models (README.md). In an empty folder:
//   npm install ts-json-schema-generator@2 @kubernetes-models/gke@4.6.2 @kubernetes-models/prometheus-operator@6.0.0 \
//     @kubernetes-models/external-secrets@2.0.0 && cp .../manifests/schemas/vendor.mjs . && node vendor.mjs .../manifests/schemas
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createGenerator } from "ts-json-schema-generator";

const KINDS = {
  gke: ["cloud.google.com/v1/BackendConfig", "networking.gke.io/v1/ManagedCertificate", "networking.gke.io/v1beta1/FrontendConfig"],
  "prometheus-operator": ["ServiceMonitor", "PodMonitor", "PrometheusRule"].map((kind) => `monitoring.coreos.com/v1/${kind}`),
  "external-secrets": ["external-secrets.io/v1/ExternalSecret", "external-secrets.io/v1/SecretStore"],
};

function trimmed(value, names) {
  if (Array.isArray(value)) return value.map((one) => trimmed(one, names));
  if (typeof value !== "object" || value === null) return value;
  const kept = {};
  for (const [key, one] of Object.entries(value)) {
    if (key === "description" && typeof one === "string") continue; // but a field may have that name
    kept[key] = key === "$ref" ? `#/definitions/${names.get(decodeURIComponent(one.slice(14)))}` : trimmed(one, names);
  }
  return kept;
}

const [, , target] = process.argv;
writeFileSync("tsconfig.json", JSON.stringify({ compilerOptions: { module: "esnext", moduleResolution: "bundler", strict: true } }));
for (const [name, paths] of Object.entries(KINDS)) {
  const folder = `node_modules/@kubernetes-models/${name}`;
  const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`));
  for (const path of paths) {
    const [group, release, kind] = path.split("/");
    const generator = createGenerator({ path: `${folder}/${path}.d.ts`, type: `I${kind}`, tsconfig: "tsconfig.json", skipTypeCheck: true, additionalProperties: false, topRef: false, expose: "all" });
    const schema = generator.createSchema(`I${kind}`);
    schema.properties.metadata = { type: "object" };
    delete schema.properties.status;
    // Only what is still referred to, under the short names of its fields.
    const used = new Set();
    const visit = (value) => {
      if (typeof value !== "object" || value === null) return;
      const reference = typeof value.$ref === "string" && decodeURIComponent(value.$ref.slice(14));
      if (reference && !used.has(reference)) { used.add(reference); visit(schema.definitions[reference]); }
      Object.values(value).forEach(visit);
    };
    const { definitions, ...top } = schema;
    visit(top);
    const names = new Map([...used].map((one, i) => [one, String(i)]));
    const out = trimmed(top, names);
    out.definitions = Object.fromEntries([...used].map((one) => [names.get(one), trimmed(definitions[one], names)]));
    out.$comment = `${path}, from the npm package @kubernetes-models/${name} ${version}, licence ${license}; see README.md`;
    mkdirSync(`${target}/${group}`, { recursive: true });
    writeFileSync(`${target}/${group}/${kind}_${release}.json`, JSON.stringify(out) + "\n");
  }
}
