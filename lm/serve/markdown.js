// Markdown of an answer as elements. The text is not trusted: every character of it goes into a text node, no tag, link
// or picture comes from it. Links and pictures are shown as their source.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE = /(`+)(.+?)\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*|__(\S(?:.*?\S)?)__(?!\w)|~~(\S(?:.*?\S)?)~~|\*(\S(?:.*?\S)?)\*|\b_(\S(?:.*?\S)?)_(?!\w)/s;
const DEEPEST = 8; // blocks and marks within each other; what is deeper is shown as text

export function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

// A fragment with the blocks of a text.
export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const made = document.createDocumentFragment();
  if (depth > DEEPEST) {
    made.append(element("p", lines.join("\n")));
    return made;
  }
  let at = 0;
  while (at < lines.length) {
    const found = READERS.map((read) => read(lines, at, depth)).find(Boolean);
    if (found) made.append(found.node);
    at = found ? found.next : at + 1;
  }
  return made;
}

// Each gives the element that begins at a line, and the line after it; nothing if there is none of its kind.
const READERS = [code, heading, rule, quote, list, table, paragraph];

function code(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  let next = at + 1;
  while (next < lines.length && !closes(lines[next], open[1])) next += 1;
  return { node: element("pre", element("code", lines.slice(at + 1, next).join("\n"))), next: next + 1 };
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  return found && { node: element(`h${found[1].length}`, inline(found[2], 0)), next: at + 1 };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { node: element("hr"), next: at + 1 } : null;
}

function quote(lines, at, depth) {
  let next = at;
  while (next < lines.length && QUOTE.test(lines[next])) next += 1;
  if (next === at) return null;
  const inside = lines.slice(at, next).map((line) => QUOTE.exec(line)[1]);
  return { node: element("blockquote", blocks(inside, depth + 1)), next };
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const ordered = /\d/.test(first[2]);
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(first[2], 10);
  const indent = first[1].length;
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (!item || item[1].length !== indent || /\d/.test(item[2]) !== ordered) break;
    const inside = [item[3]];
    next += 1;
    while (next < lines.length && belongs(lines, next, indent)) {
      inside.push(lines[next].slice(Math.min(indent + 2, lines[next].search(/\S|$/))));
      next += 1;
    }
    made.append(element("li", tight(blocks(inside, depth + 1))));
  }
  return { node: made, next };
}

// Whether a line goes on with an item: it is indented more, or blank before such a line.
function belongs(lines, at, indent) {
  const blank = lines[at].trim() === "";
  const line = blank ? lines[at + 1] ?? "" : lines[at];
  return line.trim() !== "" && line.search(/\S/) > indent;
}

// An item's only paragraph without its element.
function tight(fragment) {
  const only = fragment.firstElementChild;
  if (only && only.tagName === "P") only.replaceWith(...only.childNodes);
  return fragment;
}

function table(lines, at) {
  if (!(lines[at].includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-"))) return null;
  const head = cells(lines[at]);
  if (cells(lines[at + 1]).length !== head.length) return null;
  let next = at + 2;
  while (next < lines.length && lines[next].includes("|")) next += 1;
  const row = (tag) => (line) => element("tr", ...head.map((_, column) => element(tag, inline(cells(line)[column] ?? "", 0))));
  const body = element("tbody", ...lines.slice(at + 2, next).map(row("td")));
  return { node: element("table", element("thead", row("th")(lines[at])), body), next };
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function paragraph(lines, at, depth) {
  if (lines[at].trim() === "") return null;
  let next = at + 1;
  while (next < lines.length && lines[next].trim() !== "" && !READERS.slice(0, -1).some((read) => read(lines, next, depth))) next += 1;
  return { node: element("p", inline(lines.slice(at, next).join("\n"), 0)), next };
}

const MARKS = [[3, "strong"], [4, "strong"], [5, "del"], [6, "em"], [7, "em"]];

// The text with code, emphasis and line breaks.
function inline(text, depth) {
  const made = document.createDocumentFragment();
  const found = depth > DEEPEST ? null : INLINE.exec(text);
  if (!found) {
    text.split("\n").forEach((line, number) => made.append(...(number ? [element("br")] : []), line));
    return made;
  }
  const mark = MARKS.find(([group]) => found[group] !== undefined);
  const inside = mark ? element(mark[1], inline(found[mark[0]], depth + 1)) : element("code", found[2]);
  made.append(inline(text.slice(0, found.index), DEEPEST + 1), inside, inline(text.slice(found.index + found[0].length), depth));
  return made;
}
