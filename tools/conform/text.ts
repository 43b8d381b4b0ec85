/** The conformance report as text: what failed in full, then a table of the areas. */
import type { ConformanceReport } from '../../src/conform/index.ts';
import { table } from '../table.ts';
import { byArea, conforms, summarise } from './summary.ts';

/** `verbose` lists every check, not just those that failed. */
export function textReport(report: ConformanceReport, verbose: boolean): string {
  const lines: string[] = [];
  if (verbose) {
    const rows = report.checks.map(({ id, section, level, verdict, title }) => [id, section, level, verdict, title]);
    lines.push(table(['id', 'section', 'level', 'verdict', 'the device'], rows), '');
  }
  for (const { id, section, level, title, detail } of report.checks.filter(({ verdict }) => verdict === 'fail')) {
    lines.push(`FAIL ${id} (${section}, ${level}): ${title}`, ...detail.split('\n').map((line) => `     ${line}`), '');
  }
  const rows = byArea(report.checks).map(({ area, title, results }) => {
    const { pass, fail, notApplicable, untestable } = summarise(results);
    return [area, title, pass, fail, notApplicable, untestable];
  });
  const { pass, fail, notApplicable, untestable } = summarise(report.checks);
  rows.push(['', 'all', pass, fail, notApplicable, untestable]);
  lines.push(table(['area', 'what', 'pass', 'fail', 'not applicable', 'not testable'], rows), '');
  lines.push(verdictLine(report));
  return lines.join('\n');
}

function verdictLine(report: ConformanceReport): string {
  if (report.lost !== null) return `The device is gone: ${report.lost}`;
  const failed = report.checks.filter(({ verdict }) => verdict === 'fail');
  const musts = failed.filter(({ level }) => level === 'MUST').length;
  const shoulds = failed.length - musts;
  if (!conforms(report.checks)) return `The device does not conform: ${musts} MUST and ${shoulds} SHOULD failed.`;
  return shoulds === 0
    ? 'The device passes all checks that apply to it.'
    : `The device conforms; ${shoulds} SHOULD failed.`;
}
