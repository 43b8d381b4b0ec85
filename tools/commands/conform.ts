/**
 * `vipsec conform DEVICE`: a device against each requirement of the standard.
 */
import { writeFileSync } from 'node:fs';
import { Command, InvalidArgumentError, Option } from 'commander';
import {
  areaOf,
  CHECKS,
  type Check,
  type ConformanceReport,
  openFunction,
  type RingFormat,
  runConformance,
  WIRE_REVISIONS,
  type WireRevision,
} from '../../src/conform/index.ts';
import { InputError } from '../../src/errors.ts';
import { ExitCode, note, ProgressLine, print, printJson, untilSignal } from '../cli.ts';
import { htmlReport } from '../conform/html.ts';
import { jsonReport } from '../conform/json.ts';
import { junitReport } from '../conform/junit.ts';
import { conforms } from '../conform/summary.ts';
import { textReport } from '../conform/text.ts';
import { table } from '../table.ts';

interface Flags {
  readonly only?: string[];
  readonly peer?: string;
  readonly wire: WireRevision | 'auto';
  readonly ring: RingFormat | 'auto';
  readonly timeout: number;
  readonly list?: true;
  readonly verbose?: true;
  readonly json?: true;
  readonly junit?: string;
  readonly html?: string;
}

function milliseconds(text: string): number {
  if (!/^\d{2,6}$/.test(text)) throw new InvalidArgumentError('milliseconds, 10 to 999999');
  return Number(text);
}

function collect(value: string, previous: string[] = []): string[] {
  return [...previous, ...value.split(',')];
}

export function command(): Command {
  return new Command('conform')
    .description('check a device against each requirement of the standard')
    .argument('[device]', '0000:01:00.0 or vfio-user:/path')
    .addOption(
      new Option('--only <id>', 'check ADM-004, or area ADM, alone; may be repeated, or a list with commas').argParser(
        collect,
      ),
    )
    .option('--peer <device>', 'the function at the other end of the link; default: does the link lead back?')
    .addOption(
      new Option('--wire <revision>', 'revision of the IPsec structures')
        .choices(['auto', ...WIRE_REVISIONS])
        .default('auto'),
    )
    .addOption(
      new Option('--ring <format>', 'format of the virtqueues; auto: split, unless the device takes packed ones only')
        .choices(['auto', 'split', 'packed'])
        .default('auto'),
    )
    .addOption(
      new Option('--timeout <ms>', 'what the device may take for an answer').argParser(milliseconds).default(1000),
    )
    .option('--list', 'list the checks instead of running them; needs no device')
    .option('-v, --verbose', 'list every check, not just what failed')
    .option('--json', 'print the report as one JSON document')
    .option('--junit <file>', 'write the report as JUnit XML as well')
    .option('--html <file>', 'write the report as one HTML page as well')
    .addHelpText(
      'after',
      '\nThe function is reset before and after each check. Exit code 1: a MUST failed, or the device is gone.',
    )
    .action(run);
}

async function run(device: string | undefined, flags: Flags): Promise<void> {
  const checks = select(flags.only);
  if (flags.list === true) {
    list(checks, flags.json === true);
    return;
  }
  if (device === undefined) throw new InputError('USAGE', 'which device?', { hint: 'vipsec conform DEVICE' });
  const report = await untilSignal((signal) => check(device, checks, flags, signal));
  if (flags.json === true) printJson(jsonReport(report));
  else print(textReport(report, flags.verbose === true));
  if (report.lost !== null) note(`vipsec: error: the device is gone: ${report.lost} [DEVICE_GONE]`);
  if (report.lost !== null || !conforms(report.checks)) process.exitCode = ExitCode.failed;
  // Last: a place that cannot be written must not cost the report.
  if (flags.junit !== undefined) writeFileSync(flags.junit, junitReport(report));
  if (flags.html !== undefined) writeFileSync(flags.html, htmlReport(report));
}

/** The checks that `--only` names. */
function select(only: readonly string[] | undefined): readonly Check[] {
  if (only === undefined) return CHECKS;
  const wanted = (check: Check, name: string) => check.id === name || areaOf(check.id) === name;
  const unknown = only.find((name) => !CHECKS.some((check) => wanted(check, name.toUpperCase())));
  if (unknown !== undefined) {
    throw new InputError('CHECK_UNKNOWN', `there is no check ${unknown}`, {
      hint: '`vipsec conform --list` lists them',
    });
  }
  return CHECKS.filter((check) => only.some((name) => wanted(check, name.toUpperCase())));
}

function list(checks: readonly Check[], json: boolean): void {
  const rows = checks.map((check) => ({
    id: check.id,
    section: check.section,
    level: check.level,
    title: check.title,
    untestable: 'untestable' in check ? check.untestable : null,
  }));
  if (json) printJson(rows);
  else
    print(
      table(
        ['id', 'section', 'level', 'the device'],
        rows.map(({ id, section, level, title }) => [id, section, level, title]),
      ),
    );
}

async function check(
  device: string,
  checks: readonly Check[],
  flags: Flags,
  signal: AbortSignal,
): Promise<ConformanceReport> {
  using progress = new ProgressLine();
  const { peer } = flags;
  return await runConformance({
    open: () => openFunction(device),
    ...(peer === undefined ? {} : { openPeer: () => openFunction(peer) }),
    wire: flags.wire,
    ring: flags.ring,
    timeout: flags.timeout,
    checks,
    signal,
    onCheck: ({ id, title }, place) => progress.update(() => `${place + 1}/${checks.length} ${id} ${title}`),
  });
}
