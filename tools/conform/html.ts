/**
 * The conformance report as one HTML page: nothing is loaded from elsewhere, and it works without scripts. Filters
 * are check boxes that the style sheet looks at; details fold by themselves.
 */
import { AREAS, type CheckResult, type ConformanceReport, type Verdict } from '../../src/conform/index.ts';
import { escapeMarkup } from './markup.ts';
import { type AreaResults, byArea, conforms, type Summary, summarise } from './summary.ts';

const VERDICTS: readonly { readonly verdict: Verdict; readonly name: string; readonly count: keyof Summary }[] = [
  { verdict: 'fail', name: 'failed', count: 'fail' },
  { verdict: 'pass', name: 'passed', count: 'pass' },
  { verdict: 'not-applicable', name: 'not applicable', count: 'notApplicable' },
  { verdict: 'untestable', name: 'not testable', count: 'untestable' },
];

export function htmlReport(report: ConformanceReport): string {
  const areas = byArea(report.checks);
  const title = `Conformance of ${escapeMarkup(report.device.address)}`;
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>${title}</title>
<style>${style()}</style>
</head>
<body>
<header>
<p class="kicker">Virtio 1.4 · network device with IPsec</p>
<h1>${title}</h1>
${verdictBanner(report)}
</header>
<main>
<section class="cards" aria-label="Verdicts">${cards(report)}</section>
${proportions(summarise(report.checks))}
<details class="about"><summary>The device</summary>${deviceTable(report.device)}</details>
<fieldset class="filters"><legend>Show</legend>
${VERDICTS.map(verdictFilter).join('\n')}
<span class="gap"></span>
${levelFilters()}
</fieldset>
<fieldset class="filters"><legend>Areas</legend>
${areas.map(areaFilter).join('\n')}
</fieldset>
${areas.map(areaSection).join('\n')}
</main>
<footer>Sections are those of Virtio 1.4. Each check can be run alone: <code>vipsec conform DEVICE --only ID</code></footer>
</body>
</html>
`;
}

function verdictBanner(report: ConformanceReport): string {
  const failed = report.checks.filter(({ verdict }) => verdict === 'fail');
  const musts = failed.filter(({ level }) => level === 'MUST').length;
  const shoulds = failed.length - musts;
  if (report.lost !== null) return `<p class="banner bad">The device is gone: ${escapeMarkup(report.lost)}</p>`;
  if (!conforms(report.checks))
    return `<p class="banner bad">Does not conform: ${musts} MUST and ${shoulds} SHOULD failed</p>`;
  if (shoulds > 0) return `<p class="banner fair">Conforms; ${shoulds} SHOULD failed</p>`;
  return '<p class="banner good">Passes every check that applies to it</p>';
}

function cards(report: ConformanceReport): string {
  const summary = summarise(report.checks);
  return VERDICTS.map(
    ({ verdict, name, count }) => `<div class="card ${verdict}"><b>${summary[count]}</b><span>${name}</span></div>`,
  ).join('');
}

/** A bar of the verdicts' shares. */
function proportions(summary: Summary): string {
  const parts = VERDICTS.filter(({ count }) => summary[count] > 0).map(
    ({ verdict, count }) => `<i class="${verdict}" style="flex-grow:${summary[count]}"></i>`,
  );
  return `<div class="bar" aria-hidden="true">${parts.join('')}</div>`;
}

function deviceTable(device: ConformanceReport['device']): string {
  const rows = Object.entries(device).map(
    ([name, value]) => `<tr><th>${escapeMarkup(name)}</th><td>${escapeMarkup(shown(name, value))}</td></tr>`,
  );
  return `<table>${rows.join('')}</table>`;
}

/** PCI ids are read in hexadecimal. */
function shown(name: string, value: unknown): string {
  return typeof value === 'number' && /Id$|Code$/.test(name) ? `0x${value.toString(16)}` : String(value);
}

function verdictFilter({ verdict, name }: (typeof VERDICTS)[number]): string {
  return `<label class="${verdict}"><input type="checkbox" id="show-${verdict}" checked> ${name}</label>`;
}

function levelFilters(): string {
  return ['MUST', 'SHOULD']
    .map((level) => `<label><input type="checkbox" id="show-${level}" checked> ${level}</label>`)
    .join('\n');
}

function areaFilter({ area, results }: AreaResults): string {
  const failed = summarise(results).fail;
  const mark = failed > 0 ? ` <em>${failed}</em>` : '';
  return `<label><input type="checkbox" id="show-${area}" checked> <a href="#${area}">${area}</a>${mark}</label>`;
}

function areaSection({ area, title, results }: AreaResults): string {
  const { pass, fail } = summarise(results);
  return `<section class="area area-${area}" id="${area}">
<h2>${escapeMarkup(title)} <small>${pass} of ${pass + fail} passed</small></h2>
${results.map(row).join('\n')}
</section>`;
}

function row({ id, section, level, title, verdict, detail, duration }: CheckResult): string {
  const open = verdict === 'fail' ? ' open' : '';
  const name = VERDICTS.find((entry) => entry.verdict === verdict)?.name ?? verdict;
  const [first, ...rest] = detail.split('\n');
  const isStory = verdict === 'pass';
  const reason = isStory || first === '' ? '' : `<p class="reason">${escapeMarkup(first)}</p>`;
  const story = (isStory ? [first, ...rest] : rest).filter((line) => line !== '');
  const steps = story.length === 0 ? '' : `<ol>${story.map((line) => `<li>${escapeMarkup(line)}</li>`).join('')}</ol>`;
  return `<details class="check ${verdict} ${level}" id="${id}"${open}>
<summary><span class="verdict">${name}</span><code>${id}</code><span class="level">${level}</span><span class="title">${escapeMarkup(title)}</span><span class="section">${section}</span></summary>
<div class="detail">${reason}${steps}<p class="meta">${duration} ms · <code>--only ${id}</code></p></div>
</details>`;
}

/** A rule for each check box: what it stands for is not shown while it is not checked. */
function filterRules(): string {
  const hide = (id: string, what: string) => `body:has(#show-${id}:not(:checked)) ${what}{display:none}`;
  return [
    ...VERDICTS.map(({ verdict }) => hide(verdict, `.check.${verdict}`)),
    ...['MUST', 'SHOULD'].map((level) => hide(level, `.check.${level}`)),
    ...Object.keys(AREAS).map((area) => hide(area, `.area-${area}`)),
  ].join('\n');
}

function style(): string {
  return `
:root{color-scheme:light dark;--ground:#f6f7f9;--paper:#fff;--ink:#1c2330;--soft:#5b6575;--line:#dfe3e9;--fail:#c62f3b;--pass:#1d8a55;--na:#8892a0;--un:#b07a12;--accent:#2f5fd0}
@media(prefers-color-scheme:dark){:root{--ground:#12151b;--paper:#1a1f28;--ink:#e5e9f0;--soft:#98a3b3;--line:#2c3440;--fail:#ff6b74;--pass:#4cc38a;--na:#7d8897;--un:#e0b04c;--accent:#7ea2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
header,main,footer{max-width:68rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
.kicker{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.04em;text-transform:uppercase}
h1{margin:.2rem 0 .8rem;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere}
h2{margin:2.2rem 0 .6rem;font-size:1.1rem}
h2 small{margin-left:.5rem;color:var(--soft);font-weight:400}
code{font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.banner{display:inline-block;margin:0 0 1.2rem;padding:.45rem .9rem;border-radius:.5rem;font-weight:600;color:#fff;overflow-wrap:anywhere}
.banner.good{background:#1d8a55}.banner.fair{background:#a06c08}.banner.bad{background:#c62f3b}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.8rem}
.card{padding:.9rem 1rem;background:var(--paper);border:1px solid var(--line);border-top:3px solid var(--tone);border-radius:.6rem}
.card b{display:block;font-size:1.9rem;line-height:1.1;color:var(--tone);font-variant-numeric:tabular-nums}
.card span{color:var(--soft)}
.fail{--tone:var(--fail)}.pass{--tone:var(--pass)}.not-applicable{--tone:var(--na)}.untestable{--tone:var(--un)}
.bar{display:flex;gap:2px;height:.5rem;margin:.9rem 0 1.2rem;border-radius:.25rem;overflow:hidden}
.bar i{min-width:3px;background:var(--tone)}
.about table{border-collapse:collapse;margin:.4rem 0}
.about th{padding:.1rem 1.2rem .1rem 0;text-align:left;font-weight:400;color:var(--soft)}
.filters{display:flex;flex-wrap:wrap;gap:.4rem .9rem;align-items:center;margin:.9rem 0 0;padding:.5rem .9rem;border:1px solid var(--line);border-radius:.6rem;background:var(--paper)}
.filters legend{padding:0 .4rem;color:var(--soft);font-size:.85rem}
.filters label{cursor:pointer;white-space:nowrap}
.filters input{accent-color:var(--tone,var(--accent))}
.filters a{color:inherit}
.filters em{padding:0 .4rem;border-radius:.6rem;background:var(--fail);color:#fff;font-style:normal;font-size:.8rem}
.gap{flex:0 0 1rem}
.check{background:var(--paper);border:1px solid var(--line);border-left:4px solid var(--tone);border-radius:.4rem;margin:.3rem 0}
.check:target{outline:2px solid var(--accent)}
.check summary{display:grid;grid-template-columns:7.2rem 4.8rem 4.6rem 1fr auto;gap:.6rem;align-items:baseline;padding:.4rem .8rem;cursor:pointer;list-style:none}
.check summary::-webkit-details-marker{display:none}
.check summary:hover{background:color-mix(in srgb,var(--tone) 7%,transparent)}
.verdict{color:var(--tone);font-weight:600}
.level{font-size:.75rem;letter-spacing:.05em;color:var(--soft)}
.section{color:var(--soft);font-variant-numeric:tabular-nums;font-size:.88rem}
.detail{padding:.2rem .8rem .7rem;border-top:1px solid var(--line)}
.reason{margin:.5rem 0;font-weight:600;overflow-wrap:anywhere}
.detail ol{margin:.5rem 0;padding-left:1.6rem;color:var(--soft);font:.84rem/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.meta{margin:.3rem 0 0;color:var(--soft);font-size:.82rem}
footer{padding:2.5rem 1.25rem;color:var(--soft);font-size:.88rem}
@media(max-width:46rem){.check summary{grid-template-columns:auto auto auto 1fr}.title{grid-column:1/-1;grid-row:2}.section{justify-self:end}}
@media print{.filters{display:none}body{background:#fff}}
${filterRules()}
`;
}
