// The overview's slider. Without this script the form asks the server for the same numbers.
"use strict";

const form = document.getElementById("reach-form");
if (form) start(form);

function start(form) {
  const reach = JSON.parse(form.dataset.reach);
  const field = (name) => document.getElementById(name);
  const [share, cost, margin] = ["share", "cost", "margin"].map(field);
  const count = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const small = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  const best = field("best");
  const marker = addMarker(field("gains"));
  // Other horizons, questions and segments of this page; what was entered goes with them.
  const links = document.querySelectorAll('main a[href^="?"]');

  // Only the shop knows cost and margin: until both are entered there is no profit to tell.
  const known = () => cost.value !== "" && margin.value !== "";
  const amount = (input) => Math.max(0, Number(input.value) || 0);
  const profit = (k) => amount(margin) * reach.hits[k] - amount(cost) * reach.contacted[k];

  function update() {
    const k = Number(share.value);
    const gain = profit(k);
    field("share-out").value = k;
    field("contacted").textContent = count.format(reach.contacted[k]);
    field("hits").textContent = count.format(reach.hits[k]);
    field("misses").textContent = count.format(reach.contacted[k] - reach.hits[k]);
    field("profit").textContent = known() ? (Math.abs(gain) < 100 ? small : count).format(gain) : "–";
    best.hidden = !known();
    field("lowest").textContent = reach.lowest[k];
    const link = new URL(field("download").href);
    link.searchParams.set("share", k);
    field("download").href = link;
    links.forEach(carry);
    let left = reach.contacted[k];
    for (const bar of [...document.querySelectorAll("#histogram .reached")].reverse()) {
      const n = Number(bar.dataset.n);
      const reached = Math.min(left, n);
      left -= reached;
      const height = (Number(bar.dataset.height) * reached) / n;
      bar.setAttribute("y", 40 - height);
      bar.setAttribute("height", height);
    }
    marker(k / 100);
  }

  function carry(link) {
    const url = new URL(link.href);
    for (const { name, value } of [share, cost, margin]) {
      if (value === "") url.searchParams.delete(name);
      else url.searchParams.set(name, value);
    }
    link.href = url;
  }

  for (const input of [share, cost, margin]) input.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  best.addEventListener("click", () => {
    const gains = reach.hits.map((_, k) => profit(k));
    share.value = gains.indexOf(Math.max(...gains));
    update();
  });
  document.documentElement.classList.add("script");
  update();
  // Browsers put back what was entered, after a step back say, once scripts like this have run.
  addEventListener("pageshow", update);
}

// A line through the chart at the chosen share; the figure names the plot's borders.
function addMarker(figure) {
  const { left, right, top, bottom } = figure.dataset;
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "marker");
  line.setAttribute("y1", top);
  line.setAttribute("y2", bottom);
  figure.querySelector("svg").append(line);
  return (share) => {
    const x = Number(left) + share * (right - left);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
  };
}
