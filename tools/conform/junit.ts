/**
 * The conformance report as JUnit XML, as continuous integration systems read it: a suite for each area, a test case
 * for each check.
 *
 * A SHOULD that failed is a failure of type SHOULD: what to make of it is for the reader to set. What is not
 * applicable or not testable is skipped, with the reason.
 */
import type { CheckResult, ConformanceReport } from '../../src/conform/index.ts';
import { escapeMarkup } from './markup.ts';
import { byArea, summarise } from './summary.ts';

export function junitReport(report: ConformanceReport): string {
  const suites = byArea(report.checks).map(({ area, title, results }) => {
    const cases = results.map((result) => testCase(area, result));
    return [
      `  <testsuite name="${escapeMarkup(`${area} ${title}`)}" ${counts(results)}>`,
      ...cases,
      '  </testsuite>',
    ].join('\n');
  });
  return [
    '<?xml version="1.0" encoding="UTF-8"?>',
    `<testsuites name="vipsec conform" ${counts(report.checks)}>`,
    ...suites,
    '</testsuites>',
    '',
  ].join('\n');
}

function counts(results: readonly CheckResult[]): string {
  const { fail, notApplicable, untestable } = summarise(results);
  const time = results.reduce((sum, { duration }) => sum + duration, 0);
  return `tests="${results.length}" failures="${fail}" errors="0" skipped="${notApplicable + untestable}" time="${seconds(time)}"`;
}

function seconds(milliseconds: number): string {
  return (milliseconds / 1000).toFixed(3);
}

function testCase(area: string, { id, section, level, title, verdict, detail, duration }: CheckResult): string {
  const head = `    <testcase classname="${area}" name="${escapeMarkup(`${id} ${section} ${level} ${title}`)}" time="${seconds(duration)}"`;
  const text = escapeMarkup(detail);
  const [first] = text.split('\n');
  if (verdict === 'pass') return `${head}>\n      <system-out>${text}</system-out>\n    </testcase>`;
  if (verdict === 'fail')
    return `${head}>\n      <failure type="${level}" message="${first}">${text}</failure>\n    </testcase>`;
  return `${head}>\n      <skipped message="${verdict}: ${first}"/>\n    </testcase>`;
}
