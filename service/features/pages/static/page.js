// Updates the page while events arrive. The server renders everything; the script fetches and replaces parts.

const REFRESH_DELAY_MS = 1200;
const REFRESH_INTERVAL_MS = 60_000;
const RETRY_MIN_MS = 1000;
const RETRY_MAX_MS = 20_000;
const SLIDER_DELAY_MS = 90;

const body = document.body;
const numbers = new Intl.NumberFormat(document.documentElement.lang === "id" ? "id-ID" : "en-GB");
// The HTML of each part as the server sent it. In the page, its details may have been opened since.
const sources = new WeakMap();

/** Return a selector that finds an element again in a new version of its part, or null. */
function selectorFor(element) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  const href = element.getAttribute("href");
  return href === null ? null : `a[href="${CSS.escape(href)}"]`;
}

/** Replace a part's content, but keep opened details, the focus, and marks on new entries. */
function replacePart(part, newPart) {
  const openIds = [...part.querySelectorAll("details[open][id]")].map((details) => details.id);
  const focus = part.contains(document.activeElement) ? selectorFor(document.activeElement) : null;
  const versions = [...part.querySelectorAll("[data-version]")].map((entry) => Number(entry.dataset.version));
  const newest = Math.max(0, ...versions);
  part.className = newPart.className;
  part.replaceChildren(...newPart.childNodes);
  for (const id of openIds) document.getElementById(id)?.setAttribute("open", "");
  for (const entry of part.querySelectorAll("[data-version]")) {
    if (newest && Number(entry.dataset.version) > newest) entry.classList.add("is-new");
  }
  if (focus) part.querySelector(focus)?.focus({ preventScroll: true });
}

/** Replace the parts of this page that differ in a newly fetched one. */
function update(newDocument) {
  document.title = newDocument.title;
  for (const part of document.querySelectorAll("[data-live]")) {
    const newPart = newDocument.getElementById(part.id);
    if (!newPart || sources.get(part) === newPart.outerHTML) continue;
    sources.set(part, newPart.outerHTML);
    replacePart(part, newPart);
  }
  const [slider, newSlider] = [document, newDocument].map((page) => page.getElementById("version"));
  if (slider && newSlider) {
    const isAtEnd = slider.value === slider.max && document.activeElement !== slider;
    slider.max = newSlider.max;
    if (isAtEnd) slider.value = newSlider.value;
    showVersion(slider);
  }
}

async function refresh(position) {
  const url = new URL(location.href);
  url.hash = "";
  if (position) url.searchParams.set("after_position", position);
  const response = await fetch(url, { headers: { Accept: "text/html" }, cache: "no-store" });
  if (response.status === 401) return location.reload();
  if (response.ok) update(new DOMParser().parseFromString(await response.text(), "text/html"));
}

let refreshTimer = null;
let lastEventId = "";
let announcement = "";

/** Refresh after a delay. Further calls before then change nothing, so that a busy log causes few requests. */
function scheduleRefresh(delay) {
  if (refreshTimer !== null || document.hidden) return;
  refreshTimer = setTimeout(async () => {
    refreshTimer = null;
    const [position, text] = [lastEventId, announcement];
    announcement = "";
    try {
      await refresh(position);
      if (text) document.getElementById("announcement").textContent = text;
    } catch { /* The service is unreachable. The next event after the reconnection refreshes the page. */ }
  }, delay);
}

function handleMessage(message) {
  let data = "";
  for (const line of message.split("\n")) {
    if (line.startsWith("id:")) lastEventId = line.slice(3).trim();
    else if (line.startsWith("data:")) data += line.slice(5);
  }
  if (!data) return;
  const isOrder = document.getElementById("timeline") !== null;
  // Screen readers announce new reports of one order, not those of all orders on the overview.
  if (isOrder) announcement = `${body.dataset.new} ${JSON.parse(data).data?.reported_status ?? ""}`;
  scheduleRefresh(isOrder ? 0 : REFRESH_DELAY_MS);
}

function showState(state) {
  const live = document.getElementById("live");
  live.hidden = false;
  live.dataset.state = state;
}

const sleep = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

const untilVisible = () => new Promise((resolve) => {
  if (!document.hidden) resolve();
  else document.addEventListener("visibilitychange", resolve, { once: true });
});

/**
 * Read an event stream from the last event on, and reconnect whenever it ends. The connection is closed while the
 * page is hidden, because a browser allows only a few connections to a host for all of its tabs.
 */
async function follow(path) {
  for (let delay = RETRY_MIN_MS; ; delay = Math.min(delay * 2, RETRY_MAX_MS)) {
    await untilVisible();
    const controller = new AbortController();
    const abort = () => controller.abort();
    document.addEventListener("visibilitychange", abort, { once: true });
    try {
      const headers = { Accept: "text/event-stream", ...(lastEventId && { "Last-Event-ID": lastEventId }) };
      const response = await fetch(path, { headers, cache: "no-store", signal: controller.signal });
      if (response.status === 401) return location.reload();
      if (response.ok) {
        showState("live");
        delay = RETRY_MIN_MS;
        await readMessages(response.body.pipeThrough(new TextDecoderStream()).getReader());
      }
    } catch { /* The connection was lost or closed. The loop reconnects. */ }
    document.removeEventListener("visibilitychange", abort);
    if (controller.signal.aborted) continue;
    showState("lost");
    await sleep(delay);
  }
}

async function readMessages(reader) {
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const messages = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = messages.pop();
    messages.forEach(handleMessage);
  }
}

function showVersion(slider) {
  const label = document.getElementById("version-text");
  const [version, head] = [slider.value, slider.max].map((number) => numbers.format(number));
  label.textContent = label.dataset.text.replace("{version}", version).replace("{head}", head);
  slider.setAttribute("aria-valuetext", label.textContent);
  document.getElementById("to-current").hidden = slider.value === slider.max;
}

/** Show each version while the slider moves. */
function enableSlider(slider) {
  let timer = null;
  showVersion(slider);
  slider.form.classList.add("is-live");
  slider.addEventListener("input", () => {
    showVersion(slider);
    const url = new URL(location.href);
    url.search = slider.value === slider.max ? "" : `?version=${slider.value}`;
    history.replaceState(null, "", url);
    clearTimeout(timer);
    timer = setTimeout(() => refresh().catch(() => {}), SLIDER_DELAY_MS);
  });
}

/** Open a raw report in a dialog instead of on its own page. */
async function openReport(link) {
  const response = await fetch(link.href, { headers: { Accept: "text/html" } });
  const report = new DOMParser().parseFromString(await response.text(), "text/html").getElementById("report");
  if (!report) return location.assign(link.href);
  document.getElementById("dialog-content").replaceChildren(report);
  document.getElementById("dialog").showModal();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-raw]");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  openReport(link).catch(() => location.assign(link.href));
});

for (const part of document.querySelectorAll("[data-live]")) sources.set(part, part.outerHTML);
const slider = document.getElementById("version");
if (slider) enableSlider(slider);
if (body.dataset.stream) {
  showState("connecting");
  follow(body.dataset.stream);
  // Durations grow without an event.
  setInterval(() => scheduleRefresh(0), REFRESH_INTERVAL_MS);
  document.addEventListener("visibilitychange", () => scheduleRefresh(0));
}
