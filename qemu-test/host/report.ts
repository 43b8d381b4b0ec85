/** What a run prints in the end. */
import Table from 'cli-table3';
import type { ScenarioResult } from './scenario-run.ts';

export function resultTable(results: readonly ScenarioResult[]): string {
  const table = new Table({
    head: ['scenario', 'checks', 'seconds', 'verdict', 'what it proves'],
    style: { head: [], border: [] },
  });
  for (const { name, title, checks, seconds, passed, restarted, obstacle } of results) {
    const good = checks.filter((check) => check.verdict === 'pass').length;
    const outcome = obstacle !== null ? 'not here' : passed ? 'pass' : 'FAIL';
    const verdict = `${outcome}${restarted === null ? '' : ', 2 boots'}`;
    table.push([name, `${good}/${checks.length}`, seconds.toFixed(1), verdict, title]);
  }
  const obstacles = results.filter(({ obstacle }) => obstacle !== null);
  return `${table.toString()}\n${obstacles.map(({ name, obstacle }) => `${name} cannot be run here: ${obstacle}\n`).join('')}`;
}

/** Every check of a scenario, one line each. */
export function checkList({ checks }: ScenarioResult): string {
  return checks
    .map(({ name, verdict, detail, ms }) => {
      const time = verdict === 'not run' ? '' : ` (${ms} ms)`;
      return `  ${verdict.padEnd(8)}${name}${detail === '' ? '' : `: ${detail}`}${time}\n`;
    })
    .join('');
}

/** Why a scenario failed, the end of its console, and how to run it alone. */
export function failureReport(result: ScenarioResult, command: string): string {
  const bad = { ...result, checks: result.checks.filter((check) => check.verdict !== 'pass') };
  const problems = result.problems.map((problem) => `  ${problem}\n`).join('');
  const console = result.console.map((line) => `  | ${line}\n`).join('');
  return [
    `\n${result.name} failed\n${problems}${checkList(bad)}`,
    `  the guest's last lines:\n${console}`,
    `  alone:         ${command} --only ${result.name} --verbose\n`,
    `  interactively: ${command} --only ${result.name} --interactive\n`,
    ...(result.before.length === 0
      ? []
      : [`  in its guest:  ${command} --only ${[...result.before, result.name].join(' ')} --jobs 1\n`]),
  ].join('');
}
