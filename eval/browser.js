"use strict";
// Text of models only ever becomes text nodes: there is no innerHTML here.
const samples = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("filter");
const list = document.getElementById("samples");
const more = document.getElementById("more");
const PAGE = 50;
const VERDICTS = {
  all: () => true,
  right: (s) => s.correct,
  wrong: (s) => !s.correct,
  truncated: (s) => s.finish === "length",
  "no box": (s) => !s.boxed,
  "not graded": (s) => s.outcome !== "scored",
};
let shown = PAGE;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function options(name, values) {
  for (const value of values) form.elements[name].append(element("option", value));
}

function matching() {
  const chosen = new FormData(form);
  const is = (name, value) => chosen.get(name) === "all" || chosen.get(name) === value;
  const text = chosen.get("text").toLowerCase();
  return samples.filter(
    (s) =>
      is("checkpoint", s.checkpoint) &&
      is("task", s.task) &&
      VERDICTS[chosen.get("verdict")](s) &&
      (!text || (s.question + "\n" + s.response).toLowerCase().includes(text)),
  );
}

function card(s) {
  const made = element("details", undefined, s.correct ? "right" : "wrong");
  const marks = [s.correct ? "right" : "wrong"];
  if (s.finish === "length") marks.push("truncated");
  if (!s.boxed) marks.push("no box");
  if (s.outcome !== "scored") marks.push(s.outcome);
  const summary = element("summary");
  summary.append(
    element("b", marks.join(", ")),
    ` ${s.checkpoint} ${s.task} ${s.id} #${s.sample}, ${s.tokens} tokens: ${s.question.slice(0, 100)}`,
  );
  made.append(summary);
  for (const [title, text] of [
    ["question", s.question],
    ["response", s.response],
    ["answer found", s.extracted === null ? "(none)" : s.extracted],
    ["reference answer", s.gold],
  ])
    made.append(element("h4", title), element("pre", text));
  return made;
}

function render() {
  const found = matching();
  list.replaceChildren(...found.slice(0, shown).map(card));
  document.getElementById("count").textContent = `${found.length} of ${samples.length} samples`;
  more.hidden = found.length <= shown;
}

function readAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (form.elements[name]) form.elements[name].value = value;
  for (const choice of form.querySelectorAll("select")) choice.value ||= "all"; // an address may name what is not there
}

options("checkpoint", ["all", ...new Set(samples.map((s) => s.checkpoint))]);
options("task", ["all", ...new Set(samples.map((s) => s.task))]);
options("verdict", Object.keys(VERDICTS));
readAddress();
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", () => {
  shown = PAGE;
  history.replaceState(null, "", "#" + new URLSearchParams(new FormData(form)));
  render();
});
addEventListener("hashchange", () => {
  readAddress();
  render();
});
more.addEventListener("click", () => {
  shown += PAGE;
  render();
});
render();
