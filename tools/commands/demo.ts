/**
 * `vipsec demo`: the whole thing on one machine, without root.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import { ExitCode, note, ProgressLine, print, printJson, untilSignal } from '../cli.ts';
import type { DemoReport } from '../demo/report.ts';
import { runDemo } from '../demo/run.ts';
import { table } from '../table.ts';

interface Options {
  readonly rounds: number;
  readonly out?: string;
  readonly json?: true;
}

export function command(): Command {
  return new Command('demo')
    .description(
      'two software devices, the driver on both, IPsec inline against software, real traffic, an outside check',
    )
    .addOption(new Option('--rounds <n>', 'how often the captures are sent').argParser(rounds).default(20))
    .option('--out <folder>', 'leave the capture of the wire and its decryption file there')
    .option('--json', 'print the report as one JSON document')
    .addHelpText('after', '\nNeeds no root and leaves nothing behind. Exit code 1: a number is not what it must be.')
    .action(run);
}

function rounds(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1 || value > 10_000) throw new InvalidArgumentError('1 to 10000');
  return value;
}

async function run(options: Options): Promise<void> {
  const report = await untilSignal(async (signal) => {
    using progress = new ProgressLine();
    const show = (describe: () => string): void => progress.update(describe);
    return await runDemo({ rounds: options.rounds, out: options.out, signal, progress: show });
  });
  if (options.json === true) printJson(report);
  else printReport(report);
  if (!report.ok) process.exitCode = ExitCode.failed;
}

function printReport(report: DemoReport): void {
  print('east: NIC with IPsec, SAs over the administration queue; west: plain NIC, the same SAs in software\n');
  const rate = `${report.packetsPerSecond} packets/s, ${report.megabitsPerSecond} Mbit/s`;
  print(`Traffic (${report.seconds.toFixed(2)} s, ${rate})`);
  print(
    table(
      [
        'direction',
        'protected by',
        'verified by',
        'packets',
        'bytes',
        'protected',
        'verified',
        'in the clear',
        'refused',
      ],
      report.directions.map(({ name, protectedBy, verifiedBy, sent, arrived, refused }) => [
        name,
        protectedBy,
        verifiedBy,
        sent.sent,
        sent.sentBytes,
        sent.sentProtected,
        arrived.verified,
        arrived.clear,
        reasons(refused),
      ]),
    ),
  );
  print('Each way one packet was replayed and one corrupted on the wire: what was refused was not delivered.');
  print('\nSecurity associations');
  print(
    table(
      ['NIC', 'SA', 'direction', 'SPI', 'where', 'packets', 'bytes', 'because'],
      report.sas.map((sa) => [
        sa.station,
        sa.name,
        sa.direction,
        `0x${sa.spi.toString(16)}`,
        sa.where,
        sa.packets,
        sa.bytes,
        sa.because,
      ]),
    ),
  );
  const { wire, tshark } = report;
  print(`\nOn the wire: ${wire.frames} frames, ${wire.esp} ESP, ${wire.clear} in the clear (ARP, neighbour discovery)`);
  print(
    tshark === null
      ? 'tshark is not installed: nobody else has looked at the wire'
      : `tshark decrypted ${tshark.authentic} of ${tshark.esp} ESP packets and found ${tshark.wrong} with a wrong ICV`,
  );
  printChecks(report);
  for (const file of report.files) print(`left: ${file}`);
}

function printChecks({ checks }: DemoReport): void {
  const wrong = checks.filter(({ ok }) => !ok);
  if (wrong.length === 0) {
    print(`${checks.length} numbers checked, all right`);
    return;
  }
  note(`${wrong.length} of ${checks.length} numbers are not what they must be:`);
  note(
    table(
      ['what', 'expected', 'found'],
      wrong.map(({ what, expected, actual }) => [what, expected, actual]),
    ),
  );
}

function reasons(counts: Readonly<Record<string, number>>): string {
  const parts = Object.entries(counts).map(([reason, count]) => `${count} ${reason}`);
  return parts.length === 0 ? '-' : parts.join(', ');
}
