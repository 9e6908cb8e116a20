// Shows /openapi.json: one section an endpoint, with what it takes and an example to paste into a shell.

import { byId, el } from "./dom.js";

const VERBS = ["get", "post", "put", "delete"];

start();

async function start() {
  const main = byId("endpoints");
  try {
    const answer = await fetch("/openapi.json");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const api = await answer.json();
    for (const [path, operations] of Object.entries(api.paths)) {
      for (const verb of VERBS.filter((each) => operations[each])) {
        main.append(endpoint(api, path, verb, operations[verb]));
      }
    }
  } catch (error) {
    main.append(el("p", { class: "note", role: "alert" }, `The description cannot be read: ${error.message}`));
  }
}

function endpoint(api, path, verb, operation) {
  const body = operation.requestBody?.content["application/json"]?.schema;
  const schema = body && resolved(api, body);
  const fields = [
    ...(operation.parameters ?? []).map((each) => ({ ...each, schema: resolved(api, each.schema) })),
    ...properties(api, schema),
  ];
  return el(
    "details",
    { class: "endpoint" },
    el("summary", {}, el("code", {}, `${verb.toUpperCase()} ${path}`), " ", el("span", { class: "hint" }, operation.description ?? "")),
    fields.length ? table(["field", "type", ""], fields.map((each) => row(api, each))) : null,
    el("h3", {}, "Example"),
    el("pre", {}, el("code", {}, command(path, verb, schema))),
    el("h3", {}, "Answers"),
    table(["status", ""], Object.entries(operation.responses).map((each) => answerRow(api, each))),
  );
}

/** The schema that is referred to; of several kinds of body the first that has fields. */
function resolved(api, schema) {
  const one = schema?.$ref ? schema : (schema?.anyOf?.find((each) => each.$ref) ?? schema);
  const name = one?.$ref?.split("/").pop();
  return name === undefined ? schema : api.components.schemas[name];
}

function properties(api, schema) {
  return Object.entries(schema?.properties ?? {}).map(([name, each]) => ({
    name,
    schema: each,
    description: each.description,
    required: schema.required?.includes(name),
  }));
}

function row(api, field) {
  const must = field.required ? "needed" : "";
  const preset = field.schema.default === undefined ? "" : `default ${JSON.stringify(field.schema.default)}`;
  const said = [field.description, must, preset].filter(Boolean).join("; ");
  return [el("code", {}, field.name), typeOf(field.schema), said];
}

function answerRow(api, [status, answer]) {
  const schema = Object.values(answer.content ?? {})[0]?.schema;
  const found = properties(api, resolved(api, schema)).map((each) => each.name);
  const holds = status.startsWith("2") && found.length ? `: ${found.join(", ")}` : "";
  return [el("code", {}, status), `${answer.description}${holds}`];
}

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  const either = schema.anyOf ?? schema.oneOf;
  if (either) return either.filter((each) => each.type !== "null").map(typeOf).join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "any";
}

function command(path, verb, schema) {
  // What is to be filled in is in capitals, so that the shell and the server take it for nothing else.
  const url = `${location.origin}${path.replace(/\{(\w+)\}/g, (_, name) => name.toUpperCase())}`;
  const example = schema?.examples?.[0];
  if (example === undefined) return verb === "get" ? `curl '${url}'` : `curl -X ${verb.toUpperCase()} '${url}'`;
  // An apostrophe would end what the shell takes as one word.
  const body = JSON.stringify(example).replaceAll("'", "\\u0027");
  const method = verb === "post" ? "" : `-X ${verb.toUpperCase()} `;
  return `curl ${method}'${url}' -H 'content-type: application/json' -d '${body}'`;
}

function table(heads, rows) {
  return el(
    "table",
    {},
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell) => el("td", {}, cell))))),
  );
}
