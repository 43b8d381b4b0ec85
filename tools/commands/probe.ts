/**
 * `vipsec probe DEVICE`: what a virtio network function says about itself.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import { isPortAddress, openFunction, openPort } from '../../src/nic/device.ts';
import type { OctepReport } from '../../src/probe/octep.ts';
import { type PortReport, probePort } from '../../src/probe/port.ts';
import { type ModeReport, type PciReport, type ProbeReport, probeFunction } from '../../src/probe/probe.ts';
import { WIRE_REVISIONS, type WireRevision } from '../../src/virtio/revision.ts';
import { ExitCode, print, printJson } from '../cli.ts';
import { table } from '../table.ts';

interface Options {
  readonly wire: WireRevision | 'auto';
  readonly timeout: number;
  readonly json?: true;
}

function milliseconds(text: string): number {
  if (!/^\d{2,6}$/.test(text)) throw new InvalidArgumentError('milliseconds, 10 to 999999');
  return Number(text);
}

export function command(): Command {
  return new Command('probe')
    .description('bring-up report of a device: PCI, virtio structures, features, administration commands, IPsec')
    .argument('<device>', '0000:01:00.0, vfio-user:/path or vhost-user:/path[,server=1]')
    .addOption(
      new Option('--wire <revision>', 'how to read the IPsec capabilities')
        .choices(['auto', ...WIRE_REVISIONS])
        .default('auto'),
    )
    .addOption(
      new Option('--timeout <ms>', 'how long a function may take for an answer').argParser(milliseconds).default(5000),
    )
    .option('--json', 'print the report as one JSON document')
    .addHelpText(
      'after',
      '\nA function is reset before and after; nothing else is changed. Exit code 1: a step failed.',
    )
    .action(run);
}

async function run(device: string, options: Options): Promise<void> {
  const report = isPortAddress(device) ? await readPort(device) : await readFunction(device, options);
  if (options.json === true) printJson(report);
  else printReport(report);
  if (report.problems.length > 0) process.exitCode = ExitCode.failed;
}

async function readFunction(device: string, { wire, timeout }: Options): Promise<ProbeReport> {
  const fn = openFunction(device);
  try {
    return await probeFunction(fn, wire, { timeout });
  } finally {
    fn.close();
  }
}

async function readPort(device: string): Promise<ProbeReport> {
  const port = await openPort(device);
  try {
    return await probePort(port);
  } finally {
    port.close();
  }
}

function hex(value: number, digits = 1): string {
  return `0x${value.toString(16).padStart(digits, '0')}`;
}

function section(title: string, body: string): void {
  print(`\n${title}\n${body}`);
}

function printReport(report: ProbeReport): void {
  print(`Device ${report.device}`);
  if (report.pci !== undefined) printPci(report.pci);
  if (report.octep !== undefined) printOctep(report.octep);
  if (report.port !== undefined) printPort(report.port);
  printVirtio(report);
  if (report.port === undefined && report.features === undefined) {
    section('Administration queue and IPsec', 'not reached');
  } else if (report.port === undefined) {
    printAdmin(report);
    printFlowFilter(report);
    printIpsec(report);
  } else section('IPsec', 'in software: vhost-user carries 64 feature bits, and VIRTIO_NET_F_IPSEC is bit 70');
  const rows = report.problems.map(({ step, code, message }) => [step, code, message]);
  if (rows.length > 0) section('Problems', table(['step', 'code', 'what'], rows));
  const failed = report.octep?.steps.filter(({ ok }) => !ok) ?? [];
  const hints = new Set([...failed, ...report.problems].flatMap(({ hint }) => hint ?? []));
  for (const hint of hints) print(`hint: ${hint}`);
}

/** Each step as it went; after the one that failed there is no other. */
function printOctep({ model, virtualFunction, speaksVirtio, steps }: OctepReport): void {
  const firmware =
    speaksVirtio === null
      ? 'it was not seen whether its firmware speaks virtio'
      : `its firmware ${speaksVirtio ? 'speaks virtio' : 'does not speak virtio'}`;
  const title = `octeon_ep class: a ${virtualFunction ? 'virtual' : 'physical'} function of ${model}; ${firmware}`;
  section(
    title,
    table(
      ['', 'step', 'expected', 'read'],
      steps.map(({ step, expected, read, ok }) => [ok ? 'ok' : 'FAILED', step, expected, read]),
    ),
  );
}

function printPci(pci: PciReport): void {
  const type = pci.virtioDeviceType;
  const ids: [string, string][] = [
    ['vendor:device', `${hex(pci.vendorId, 4).slice(2)}:${hex(pci.deviceId, 4).slice(2)}`],
    ['subsystem', `${hex(pci.subsystemVendorId, 4).slice(2)}:${hex(pci.subsystemId, 4).slice(2)}`],
    ['class, revision', `${hex(pci.classCode, 6)}, ${pci.revisionId}`],
    ['virtio device type', type === null ? 'not by its ids' : type === 1 ? '1 (network)' : String(type)],
    ['MSI-X vectors', pci.msix === null ? 'none' : String(pci.msix.vectors)],
    ['function-level reset', pci.functionLevelReset ? 'yes' : 'no'],
  ];
  section('PCI function', table(['', ''], ids));
  section(
    'PCI capabilities',
    table(
      ['at', 'id', 'name'],
      pci.capabilities.map(({ offset, id, name }) => [hex(offset, 2), hex(id, 2), name]),
    ),
  );
  section(
    'BARs',
    table(
      ['BAR', 'kind', 'bytes'],
      pci.bars.map(({ index, kind, prefetchable, size }) => [
        index,
        prefetchable ? `${kind}, prefetchable` : kind,
        size,
      ]),
    ),
  );
  section(
    'Virtio structures (4.1.4)',
    table(
      ['structure', 'BAR', 'offset', 'bytes', 'notify multiplier'],
      pci.structures.map(({ name, bar, offset, length, notifyMultiplier }) => [
        name,
        bar,
        hex(offset),
        length,
        notifyMultiplier ?? '',
      ]),
    ),
  );
}

function printPort(port: PortReport): void {
  const memory = `${port.memoryRegions} ${port.memorySlots ? 'slots' : 'regions in one table'}`;
  const list = (names: readonly string[]): string => (names.length === 0 ? '-' : names.join(', '));
  const rows: [string, string][] = [
    ['queue pairs', String(port.queuePairs)],
    ['memory', memory],
    ['offered, but not to the driver', list(port.withheld)],
    ['offered by the front-end itself', list(port.added)],
  ];
  section('vhost-user back-end', table(['', ''], rows));
  section(
    'Protocol features',
    table(
      ['bit', 'name', 'offered', 'used'],
      port.protocolFeatures.map(({ bit, name, offered, used }) => [
        bit,
        name,
        offered ? 'yes' : '-',
        used ? 'yes' : '-',
      ]),
    ),
  );
}

function printVirtio(report: ProbeReport): void {
  if (report.features !== undefined) {
    section(
      `Features (bits 0 to ${report.port === undefined ? 127 : 63}; those not listed are not defined and not offered)`,
      table(
        ['bit', 'name', 'offered'],
        report.features.map(({ bit, name, offered }) => [bit, name, offered ? 'yes' : '-']),
      ),
    );
  }
  if (report.config !== undefined) {
    const rows = Object.entries(report.config).map(([name, value]) => [
      name,
      value === null ? 'unknown' : String(value),
    ]);
    section('Device configuration (5.1.4)', table(['field', 'value'], rows));
  }
  if (report.queues !== undefined) {
    section(
      'Queues',
      table(
        ['queue', 'name', 'largest size'],
        report.queues.map(({ index, name, maxSize }) => [index, name, maxSize]),
      ),
    );
  }
}

function printAdmin(report: ProbeReport): void {
  const { admin } = report;
  if (admin === undefined) {
    section('Administration queue', 'none');
    return;
  }
  const { first, count } = admin.queues;
  section(
    `Administration commands (queue ${first}, ${count} in all)`,
    table(
      ['opcode', 'command'],
      admin.commands.map(({ opcode, name }) => [hex(opcode), name]),
    ),
  );
  section(
    'Capabilities',
    table(
      ['id', 'name', 'bytes', 'this driver'],
      admin.capabilities.map(({ id, name, bytes, used }) => [
        hex(id),
        name,
        bytes,
        used ? 'uses it' : 'does not use it',
      ]),
    ),
  );
}

function printFlowFilter({ flowFilter }: ProbeReport): void {
  if (flowFilter === undefined) return;
  if (flowFilter.limits !== undefined) {
    const rows = Object.entries(flowFilter.limits).map(([name, value]) => [name, Number(value)]);
    section('Flow filter limits', table(['limit', 'value'], rows));
  }
  if (flowFilter.selectors !== undefined) {
    section(
      'Flow filter selectors',
      table(
        ['header', 'partial mask', 'mask'],
        flowFilter.selectors.map(({ name, partialMask, mask }) => [name, partialMask ? 'yes' : 'no', mask]),
      ),
    );
  }
  if (flowFilter.actions !== undefined) section('Flow filter actions', flowFilter.actions.join(', '));
}

function printIpsec({ ipsec }: ProbeReport): void {
  if (ipsec === undefined) {
    section('IPsec', 'the device does not offer it');
    return;
  }
  const limits =
    ipsec.limits === undefined ? '' : `: ${ipsec.limits.inbound} inbound, ${ipsec.limits.outbound} outbound SAs`;
  section(
    `IPsec (${ipsec.revision})${limits}`,
    table(['mode', 'what', 'offered'], (ipsec.modes ?? []).flatMap(modeRows)),
  );
}

function modeRows(mode: ModeReport): [string, string, string][] {
  const list = (names: readonly string[]): string => (names.length === 0 ? '-' : names.join(', '));
  return [
    [mode.name, 'AEAD', list(mode.aeads)],
    ['', 'ciphers', list(mode.ciphers)],
    ['', 'authenticators', list(mode.macs)],
    ['', 'options', list(mode.options)],
    ['', 'replay window', String(mode.maxReplayWindow)],
    ['', 'key bytes', `cipher ${mode.maxCipherKeyLength}, authenticator ${mode.maxAuthKeyLength}`],
  ];
}
