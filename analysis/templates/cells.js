// What all parts share: the data, small builders of elements, and the dialog that tells of a cell.
const { settings, metrics, looks, videos, shown } =
  JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};
const pairs = (entries) => element("dl", {}, ...entries.flatMap(([name, text]) =>
  [element("dt", { textContent: name }), element("dd", { textContent: text })]));

// {a: {b: 1}} -> [["a.b", "1"]]; lists stay whole, what is not there is left out.
const flat = (value, path = []) => {
  if (value === null || value === undefined || value === "") return [];
  if (typeof value !== "object") return [[path.join("."), String(value)]];
  if (Array.isArray(value)) return [[path.join("."), JSON.stringify(value)]];
  return Object.entries(value).flatMap(([name, inner]) => flat(inner, [...path, name]));
};
const versions = (of) => of && Object.entries(of).map((pair) => pair.join(" ")).join(", ");

// A setting as it was run on one task, and if given one video of it.
function tell(setting, video) {
  const parts = [
    element("h2", { textContent: `${setting.label}, ${setting.task.toUpperCase()}` }),
    pairs(setting.facts.filter(([name]) => name !== "Task")),
  ];
  if (video) {
    parts.push(element("h3", { textContent: "This video" }));
    parts.push(pairs(flat({ prompt: video.prompt, prompt_id: video.prompt_id, ...video.made })));
  }
  parts.push(element("h3", { textContent: "Configuration" }), pairs(flat(setting.configuration)));
  parts.push(element("h3", { textContent: "Provenance" }));
  for (const origin of setting.origins) {
    parts.push(pairs(flat({ ...origin, versions: versions(origin.versions) })));
  }
  return parts;
}

function openCell(parts) {
  $("cell").lastElementChild.replaceChildren(...parts);
  $("cell").showModal();
  $("cell").scrollTop = 0;
}
$("cell").addEventListener("click", (event) => event.target === $("cell") && $("cell").close());
for (const form of document.querySelectorAll(".controls")) {
  form.addEventListener("submit", (event) => event.preventDefault());
}
