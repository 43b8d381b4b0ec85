/**
 * `vipsec esp`: software ESP and AH over a capture file, offline.
 */
import { statSync } from 'node:fs';
import { Command, Option } from 'commander';
import { InputError } from '../../src/errors.ts';
import type { EngineName } from '../../src/fallback/engines/engine.ts';
import type { SecurityAssociation } from '../../src/ipsec/sa.ts';
import { loadSaFile } from '../../src/ipsec/sa-file.ts';
import { CaptureReader, type CaptureWriter } from '../../src/packet/capture-file.ts';
import { LinkType } from '../../src/packet/fields.ts';
import { CaptureOutput } from '../capture-output.ts';
import { ExitCode, ProgressLine, print, printJson, unlessAborted, untilSignal, warn } from '../cli.ts';
import { writeEspKeys } from '../esp-keys.ts';
import { anyDropped, asInputError, EspPipeline, type EspReport, requireSas } from '../esp-pipeline.ts';
import { table } from '../table.ts';

interface Options {
  readonly sa: string;
  readonly in: string;
  readonly out: string;
  readonly engine: 'auto' | EngineName;
  readonly json?: true;
  readonly espKeys?: string;
}

export function command(): Command {
  return new Command('esp')
    .description('apply software ESP or AH to a capture')
    .requiredOption('--sa <file>', 'security associations (JSON)')
    .requiredOption('--in <capture>', 'pcap or pcapng to read: Ethernet, RAW, IPv4 or IPv6')
    .requiredOption('--out <pcap>', 'pcap to write')
    .addOption(
      new Option('--engine <name>', 'who does the arithmetic')
        .choices(['auto', 'ipsec-mb', 'openssl', 'noble'])
        .default('auto'),
    )
    .addOption(
      new Option('--wire <revision>', 'accepted for uniformity; software ESP is the same for both').choices([
        'virtio-1.4',
        'rfc-2025-01',
      ]),
    )
    .option('--esp-keys <file>', 'write a decryption file for Wireshark (contains the keys)')
    .option('--json', 'print the counters as one JSON document')
    .addHelpText(
      'after',
      '\nOutbound SAs protect what their selector matches, inbound ones verify. Exit code 3: packets were dropped.' +
        '\nEach run begins with the numbers that the SA file says: for another capture give its outbound SAs new keys,' +
        '\nor an initial sequence behind the last one, or nonces repeat.',
    )
    .action(run);
}

async function run(options: Options): Promise<void> {
  const { sas, warnings } = loadSaFile(options.sa);
  for (const warning of warnings) warn(warning);
  requireSas(sas, options.sa);
  // Signals end this process as they always do while it may wait for a pipe with nothing yet to clean up.
  using reader = new CaptureReader(options.in, { waits: true });
  const output = new CaptureOutput(options.out, options.in);
  const work = (signal: AbortSignal) => apply(options, sas, reader, output, signal);
  const { report, seconds, engines } = output.isDirect
    ? await work(new AbortController().signal)
    : await untilSignal(work);
  if (options.espKeys !== undefined) {
    const skipped = writeEspKeys(options.espKeys, sas);
    if (skipped.length > 0) warn(`Wireshark cannot decrypt the SAs ${skipped.join(', ')}: not in ${options.espKeys}`);
  }
  if (options.json === true) printJson(report);
  else printReport(report, seconds, engines);
  if (anyDropped(report)) process.exitCode = ExitCode.rejected;
}

async function apply(
  options: Options,
  sas: readonly SecurityAssociation[],
  reader: CaptureReader,
  place: CaptureOutput,
  signal: AbortSignal,
): Promise<{ report: EspReport; seconds: number; engines: string[] }> {
  using output = place;
  using progress = new ProgressLine();
  using pipeline = createPipeline(sas, options.engine);
  const { report } = pipeline;
  const size = statSync(options.in).size;
  const nanoseconds = reader.decoder.nanoseconds;
  const open = (linkType: number): CaptureWriter => output.open({ linkType, nanoseconds });
  const start = performance.now();
  for (let bursts = 1; ; bursts++) {
    const some = pipeline.step(reader, open);
    if (reader.starved) await unlessAborted(reader.more(), signal);
    else if (!some) break;
    else if (bursts % 256 === 0) await new Promise(setImmediate);
    else continue;
    // Signals are seen between turns of the event loop.
    if (signal.aborted) throw new InputError('INTERRUPTED', 'interrupted; nothing was written');
    progress.update(() => describe(report.in, reader.bytesRead, size));
  }
  // A capture without packets has a link type all the same, when it is a pcap.
  open(reader.decoder.linkType ?? LinkType.ethernet);
  output.commit();
  return { report, seconds: (performance.now() - start) / 1000, engines: pipeline.engines(sas.length) };
}

/** A pipe has no size. */
function describe(packets: number, bytes: number, size: number): string {
  return size === 0 ? `${packets} packets` : `${Math.floor((100 * bytes) / size)} %  ${packets} packets`;
}

function createPipeline(sas: readonly SecurityAssociation[], engine: 'auto' | EngineName): EspPipeline {
  try {
    return new EspPipeline(sas, engine);
  } catch (error) {
    throw asInputError(error);
  }
}

function printReport(report: EspReport, seconds: number, engines: readonly string[]): void {
  const rows: [string, string | number][] = [
    ['packets in', report.in],
    ['protected', report.protected],
    ['verified', report.verified],
    ['copied as they are', report.bypassed],
    ['dummy packets removed', report.dummy],
  ];
  for (const [reason, count] of Object.entries(report.dropped)) if (count > 0) rows.push([`dropped: ${reason}`, count]);
  rows.push(['packets out', report.out]);
  print(table(['', ''], rows));
  print(`${seconds.toFixed(3)} s with ${[...new Set(engines)].join(', ')}`);
}
