// Makes a page live. The service draws everything: what has changed is fetched as a page and put in place.

const REFRESH_PAUSE = 1200;
const REFRESH_EVERY = 60_000;
const RETRY_FIRST = 1000;
const RETRY_MAX = 20_000;
const SLIDER_PAUSE = 90;

const body = document.body;
const language = document.documentElement.lang;
const drawn = new WeakMap();

const STYLES = {
  full: { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" },
  short: { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" },
  clock: { hour: "2-digit", minute: "2-digit" },
};
const formats = Object.fromEntries(Object.entries(STYLES).map(
  ([style, options]) => [style, new Intl.DateTimeFormat(language === "id" ? "id-ID" : "en-GB", options)],
));
const exact = new Intl.DateTimeFormat(language === "id" ? "id-ID" : "en-GB",
  { dateStyle: "full", timeStyle: "long" });

/** Write times in the reader's own zone; the exact one shows when it is pointed at. */
function localise(part) {
  for (const time of part.querySelectorAll("time[data-time]")) {
    const when = new Date(time.dateTime);
    time.textContent = formats[time.dataset.time].format(when);
    time.title = exact.format(when);
  }
}

/** What tells an element again in a part that was drawn anew. */
function same(element) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  const href = element.getAttribute("href");
  return href === null ? null : `a[href="${CSS.escape(href)}"]`;
}

function replace(part, fresh) {
  const open = [...part.querySelectorAll("details[open][id]")].map((details) => details.id);
  const held = part.contains(document.activeElement) ? same(document.activeElement) : null;
  const newest = Math.max(0, ...[...part.querySelectorAll("[data-version]")].map((one) => Number(one.dataset.version)));
  localise(fresh);
  part.className = fresh.className;
  part.replaceChildren(...fresh.childNodes);
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  for (const one of part.querySelectorAll("[data-version]")) {
    if (newest && Number(one.dataset.version) > newest) one.classList.add("is-new");
  }
  if (held) part.querySelector(held)?.focus({ preventScroll: true });
}

/** Put a page that was drawn anew in the place of this one, part by part, where it differs. */
function swap(fresh) {
  document.title = fresh.title;
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    if (!other || drawn.get(part) === other.outerHTML) continue;
    drawn.set(part, other.outerHTML);
    replace(part, other);
  }
  const [slider, moved] = [document, fresh].map((page) => page.getElementById("version"));
  if (slider && moved) {
    const follows = slider.value === slider.max && document.activeElement !== slider;
    slider.max = moved.max;
    if (follows) slider.value = moved.value;
    sayVersion(slider);
  }
}

async function refresh(after) {
  const url = new URL(location.href);
  url.hash = "";
  if (after) url.searchParams.set("after_position", after);
  const answer = await fetch(url, { headers: { Accept: "text/html" }, cache: "no-store" });
  if (answer.status === 401) return location.reload();
  if (answer.ok) swap(new DOMParser().parseFromString(await answer.text(), "text/html"));
}

let due = null;
let seen = "";
let said = "";

/** Draw anew soon: at once for an order, with a pause between for all of them. */
function refreshSoon(pause) {
  if (due !== null || document.hidden) return;
  due = setTimeout(async () => {
    due = null;
    const [after, words] = [seen, said];
    said = "";
    try {
      await refresh(after);
      if (words) document.getElementById("said").textContent = words;
    } catch { /* The service is away: the stream says so, and comes back to this. */ }
  }, pause);
}

function take(message) {
  let data = "";
  for (const line of message.split("\n")) {
    if (line.startsWith("id:")) seen = line.slice(3).trim();
    else if (line.startsWith("data:")) data += line.slice(5);
  }
  if (!data) return;
  const isOrder = document.getElementById("timeline") !== null;
  // Of all orders the numbers alone are drawn: nobody wants each of them read out.
  if (isOrder) said = `${body.dataset.new} ${JSON.parse(data).data?.reported_status ?? ""}`;
  refreshSoon(isOrder ? 0 : REFRESH_PAUSE);
}

function show(state) {
  const live = document.getElementById("live");
  live.hidden = false;
  live.dataset.state = state;
}

const pauseFor = (milliseconds) => new Promise((done) => { setTimeout(done, milliseconds); });

/** Wait until the page is looked at. */
const looked = () => new Promise((done) => {
  if (!document.hidden) done();
  else document.addEventListener("visibilitychange", done, { once: true });
});

/**
 * Read the stream of events for ever, from the last one that was seen on; but not while nobody looks: a browser
 * has few connections to a host, for all its tabs.
 */
async function follow(path) {
  for (let retry = RETRY_FIRST; ; retry = Math.min(retry * 2, RETRY_MAX)) {
    await looked();
    const cut = new AbortController();
    const leave = () => cut.abort();
    document.addEventListener("visibilitychange", leave, { once: true });
    try {
      const headers = { Accept: "text/event-stream", ...(seen && { "Last-Event-ID": seen }) };
      const answer = await fetch(path, { headers, cache: "no-store", signal: cut.signal });
      if (answer.status === 401) return location.reload();
      if (answer.ok) {
        show("live");
        retry = RETRY_FIRST;
        await read(answer.body.pipeThrough(new TextDecoderStream()).getReader());
      }
    } catch { /* Cut off: it is begun again. */ }
    document.removeEventListener("visibilitychange", leave);
    if (cut.signal.aborted) continue;
    show("lost");
    await pauseFor(retry);
  }
}

async function read(reader) {
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const messages = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = messages.pop();
    messages.forEach(take);
  }
}

function sayVersion(slider) {
  const shown = document.getElementById("version-shown");
  shown.textContent = shown.dataset.words.replace("{version}", slider.value).replace("{head}", slider.max);
  slider.setAttribute("aria-valuetext", shown.textContent);
  document.getElementById("to-now").hidden = slider.value === slider.max;
}

/** Let the slider show each version as it is moved over. */
function slide(slider) {
  let waiting = null;
  sayVersion(slider);
  slider.form.classList.add("is-live");
  slider.addEventListener("input", () => {
    sayVersion(slider);
    const url = new URL(location.href);
    url.search = slider.value === slider.max ? "" : `?version=${slider.value}`;
    history.replaceState(null, "", url);
    clearTimeout(waiting);
    waiting = setTimeout(() => refresh().catch(() => {}), SLIDER_PAUSE);
  });
}

/** Show a raw report over the page, in place of going to its own. */
async function openReport(link) {
  const answer = await fetch(link.href, { headers: { Accept: "text/html" } });
  const report = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("report");
  if (!report) return location.assign(link.href);
  localise(report);
  document.getElementById("dialog-content").replaceChildren(report);
  document.getElementById("dialog").showModal();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-raw]");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  openReport(link).catch(() => location.assign(link.href));
});

for (const part of document.querySelectorAll("[data-live]")) drawn.set(part, part.outerHTML);
localise(document);
const { timeZone } = Intl.DateTimeFormat().resolvedOptions();
document.getElementById("zone").textContent = `${body.dataset.local} ${timeZone}.`;
const slider = document.getElementById("version");
if (slider) slide(slider);
if (body.dataset.stream) {
  show("connecting");
  follow(body.dataset.stream);
  // What grows by itself, such as how long an order has been where it is.
  setInterval(() => refreshSoon(0), REFRESH_EVERY);
  document.addEventListener("visibilitychange", () => refreshSoon(0));
}
