/**
 * The conformance report as one HTML page: nothing is loaded from elsewhere, and it works without scripts. Filters
 * are check boxes that the style sheet looks at; details fold by themselves. What failed comes first, with what was sent and what came.
 */
import { AREAS, type CheckResult, type ConformanceReport, type Verdict } from '../../src/conform/index.ts';
import { pageStyle } from './html-style.ts';
import { escapeMarkup } from './markup.ts';
import { type AreaResults, byArea, conforms, type Summary, summarise } from './summary.ts';

const VERDICTS: readonly { readonly verdict: Verdict; readonly name: string; readonly count: keyof Summary }[] = [
  { verdict: 'fail', name: 'failed', count: 'fail' },
  { verdict: 'pass', name: 'passed', count: 'pass' },
  { verdict: 'not-applicable', name: 'not applicable', count: 'notApplicable' },
  { verdict: 'untestable', name: 'not testable', count: 'untestable' },
];

/** Failed checks that are open from the start. */
const OPEN_FAILURES = 6;

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
<style>${pageStyle()}${filterRules()}</style>
</head>
<body>
<header>
<p class="kicker">Virtio 1.4 · network device with IPsec</p>
<h1>${title}</h1>
${facts(report.device)}
${verdictBanner(report)}
</header>
<main>
<section class="cards" aria-label="Verdicts">${cards(report)}</section>
${proportions(summarise(report.checks))}
${failures(report.checks)}
<section id="areas"><h2>Areas</h2>
${overview(areas)}</section>
<section id="checks"><h2>All checks</h2>
<div class="filters">
<fieldset><legend>Verdict</legend>
${VERDICTS.map(verdictFilter).join('\n')}</fieldset>
<fieldset><legend>Level</legend>
${levelFilters()}</fieldset>
<fieldset><legend>Area</legend>
${areas.map(areaFilter).join('\n')}</fieldset>
</div>
${areas.map(areaSection).join('\n')}
</section>
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

/** What is known of the device, in a line that wraps. */
function facts(device: ConformanceReport['device']): string {
  const names = Object.entries(device).filter(([name]) => name !== 'address');
  const items = names.map(
    ([name, value]) => `<div><dt>${escapeMarkup(words(name))}</dt><dd>${escapeMarkup(shown(name, value))}</dd></div>`,
  );
  return `<dl class="facts">${items.join('')}</dl>`;
}

/** `subsystemVendorId` as words. */
function words(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`);
}

/** All checks that failed, MUSTs before SHOULDs; as many of them open as one can take in. */
function failures(checks: readonly CheckResult[]): string {
  const failed = ['MUST', 'SHOULD'].flatMap((level) =>
    checks.filter((check) => check.verdict === 'fail' && check.level === level),
  );
  if (failed.length === 0) return '';
  const entries = failed.map((check, i) => row(check, { id: check.id, open: i < OPEN_FAILURES }));
  return `<section id="failed"><h2>What failed</h2><div class="list">${entries.join('\n')}</div></section>`;
}

/** The areas with their counts, each leading to its checks. */
function overview(areas: readonly AreaResults[]): string {
  const rows = areas.map(({ area, title, results }) => {
    const summary = summarise(results);
    const counts = VERDICTS.map(
      ({ verdict, count }) => `<td class="${verdict}">${summary[count] === 0 ? '' : summary[count]}</td>`,
    ).join('');
    return `<tr><th><a href="#${area}">${escapeMarkup(title)}</a></th><td class="share">${proportions(summary)}</td>${counts}</tr>`;
  });
  const heads = VERDICTS.map(({ name }) => `<th>${name}</th>`).join('');
  return `<table class="overview"><thead><tr><th></th><th></th>${heads}</tr></thead><tbody>${rows.join('\n')}</tbody></table>`;
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

function areaFilter({ area }: AreaResults): string {
  return `<label><input type="checkbox" id="show-${area}" checked> ${area}</label>`;
}

function areaSection({ area, title, results }: AreaResults): string {
  const { pass, fail } = summarise(results);
  return `<section class="area area-${area}" id="${area}">
<h3>${escapeMarkup(title)} <small>${pass} of ${pass + fail} passed</small></h3>
<div class="list">${results.map((result) => (result.verdict === 'fail' ? pointer(result) : row(result, { id: result.id, open: false }))).join('\n')}</div>
</section>`;
}

/** In the list of its area a check that failed leads to where it is told of. */
function pointer(result: CheckResult): string {
  return `<a class="check ${result.verdict} ${result.level}" href="#${result.id}">${head(result)}</a>`;
}

function head({ id, section, level, title, verdict }: CheckResult): string {
  const name = VERDICTS.find((entry) => entry.verdict === verdict)?.name ?? verdict;
  return `<span class="verdict">${name}</span><code>${id}</code><span class="level">${level}</span><span class="title">${escapeMarkup(title)}</span><span class="section">${section}</span>`;
}

function row(result: CheckResult, { id, open }: { readonly id: string; readonly open: boolean }): string {
  const { level, verdict, detail, duration } = result;
  const [first, ...rest] = detail.split('\n');
  const isStory = verdict === 'pass';
  const reason = isStory || first === '' ? '' : `<p class="reason">${escapeMarkup(first)}</p>`;
  const story = (isStory ? [first, ...rest] : rest).filter((line) => line !== '');
  return `<details class="check ${verdict} ${level}" id="${id}"${open ? ' open' : ''}>
<summary>${head(result)}</summary>
<div class="detail">${reason}${steps(story)}<p class="meta">${duration} ms · <code>--only ${id}</code></p></div>
</details>`;
}

/** What was done, a line each; indented lines are bytes, and belong to the one before. */
function steps(story: readonly string[]): string {
  const items: { readonly text: string; readonly dump: string[] }[] = [];
  for (const line of story) {
    const last = items[items.length - 1];
    if (line.startsWith('  ') && last !== undefined) last.dump.push(line.slice(2));
    else items.push({ text: line, dump: [] });
  }
  if (items.length === 0) return '';
  const dumped = (dump: readonly string[]) => (dump.length === 0 ? '' : `<pre>${escapeMarkup(dump.join('\n'))}</pre>`);
  return `<ol>${items.map(({ text, dump }) => `<li>${escapeMarkup(text)}${dumped(dump)}</li>`).join('')}</ol>`;
}

/** A rule for each check box: what it stands for is not shown while it is not checked. */
function filterRules(): string {
  const hide = (id: string, what: string) => `body:has(#show-${id}:not(:checked)) #checks ${what}{display:none}`;
  return [
    ...VERDICTS.map(({ verdict }) => hide(verdict, `.check.${verdict}`)),
    ...['MUST', 'SHOULD'].map((level) => hide(level, `.check.${level}`)),
    ...Object.keys(AREAS).map((area) => hide(area, `.area-${area}`)),
  ].join('\n');
}
