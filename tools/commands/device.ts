/**
 * `vipsec device`: the software virtio-net IPsec function behind vfio-user sockets, until SIGTERM or SIGINT.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import {
  DEVICE_RINGS,
  type Device,
  type DeviceRings,
  FAULTS,
  OCTEP_FAULTS,
  PERSONALITIES,
  type PersonalityName,
  startDevice,
  WIRE_REVISIONS,
  type WireRevision,
} from '../../src/device/index.ts';
import { InputError } from '../../src/errors.ts';
import { note, print, printJson, warn } from '../cli.ts';

interface Flags {
  readonly socket: string[];
  readonly link?: string;
  readonly personality: PersonalityName;
  readonly wire: WireRevision;
  readonly ipsec: boolean;
  readonly ipsecOff?: string[];
  readonly rings: DeviceRings;
  readonly queuePairs: number;
  readonly mac?: string[];
  readonly mtu: number;
  readonly fault?: string[];
  readonly json?: boolean;
}

function collect(value: string, previous: string[] = []): string[] {
  return [...previous, value];
}

function integer(value: string): number {
  if (!/^\d{1,9}$/.test(value)) throw new InvalidArgumentError('not a number');
  return Number(value);
}

export function command(): Command {
  const describe = (faults: Record<string, string>): string =>
    Object.entries(faults)
      .map(([name, effect]) => `  ${name.padEnd(26)}${effect}`)
      .join('\n');
  return new Command('device')
    .description('run the software virtio-net IPsec function for a driver or for QEMU')
    .addOption(
      new Option('--socket <path>', 'listen here for a vfio-user client; give it twice for two functions')
        .argParser(collect)
        .makeOptionMandatory(),
    )
    .option(
      '--link <link>',
      'where frames go: loopback, pair, pcap:IN,OUT, unix:PATH, unix-connect:PATH, tap:NAME (default: loopback; pair for two sockets)',
    )
    .addOption(new Option('--personality <name>', 'kind of function').choices([...PERSONALITIES]).default('standard'))
    .addOption(
      new Option('--wire <revision>', 'revision of headers and objects')
        .choices([...WIRE_REVISIONS])
        .default('virtio-1.4'),
    )
    .option('--no-ipsec', 'be a plain virtio-net function')
    .addOption(
      new Option('--ipsec-off <n>', 'function n (1 or 2) is a plain one; the other has IPsec').argParser(collect),
    )
    .addOption(
      new Option('--rings <format>', 'virtqueues that drivers may use').choices([...DEVICE_RINGS]).default('both'),
    )
    .addOption(new Option('--queue-pairs <n>', 'receive and transmit queue pairs').argParser(integer).default(1))
    .addOption(new Option('--mac <address>', 'MAC address; give it twice for two functions').argParser(collect))
    .addOption(new Option('--mtu <bytes>', 'largest IP packet').argParser(integer).default(1500))
    .addOption(
      new Option('--fault <name>', 'misbehave; may be repeated; NAME@2 is for the second function alone').argParser(
        collect,
      ),
    )
    .option('--json', 'print one JSON document when ready')
    .addHelpText(
      'after',
      `\nFaults:\n${describe(FAULTS)}\n\nFaults of --personality octep:\n${describe(OCTEP_FAULTS)}\n\nSIGUSR1 prints counters to stderr.`,
    )
    .action(async (flags: Flags) => run(flags));
}

async function run(flags: Flags): Promise<void> {
  const device = startDevice({
    sockets: flags.socket,
    ...(flags.link === undefined ? {} : { link: flags.link }),
    wire: flags.wire,
    ipsec: ipsecOf(flags),
    personality: flags.personality,
    rings: flags.rings,
    queuePairs: flags.queuePairs,
    ...(flags.mac === undefined ? {} : { macs: flags.mac }),
    mtu: flags.mtu,
    ...(flags.fault === undefined ? {} : { faults: flags.fault }),
    onWarning: warn,
  });
  const report = () => note(JSON.stringify(device.functions.map((fn) => ({ socket: fn.socket, ...fn.statistics() }))));
  process.on('SIGUSR1', report);
  // Whoever reads the ready line may send a signal at once.
  const end = stopped();
  try {
    announce(device, flags.json === true);
    await end;
  } finally {
    process.removeListener('SIGUSR1', report);
    device.close();
  }
}

/** Which functions have IPsec. */
function ipsecOf(flags: Flags): boolean[] {
  const off = (flags.ipsecOff ?? []).map(Number);
  const bad = off.find((n) => !(Number.isInteger(n) && n >= 1 && n <= flags.socket.length));
  if (bad !== undefined) throw new InputError('DEVICE_OPTION', '--ipsec-off names a function that does not exist');
  return flags.socket.map((_, i) => flags.ipsec && !off.includes(i + 1));
}

function announce(device: Device, json: boolean): void {
  const { link, wire, queuePairs, mtu } = device;
  const functions = device.functions.map(({ socket, mac, ipsec }) => ({ socket, mac, ipsec }));
  if (json) {
    printJson({ ready: true, pid: process.pid, link, wire, queuePairs, mtu, functions });
    return;
  }
  for (const { socket, mac, ipsec } of functions) {
    print(`ready: ${socket} mac ${mac} ${ipsec ? `ipsec ${wire}` : 'no ipsec'} queue-pairs ${queuePairs} link ${link}`);
  }
}

/** Resolves at SIGTERM, SIGINT or SIGHUP, which end this command as asked: exit code 0. */
function stopped(): Promise<void> {
  return new Promise((resolve) => {
    const signals = ['SIGTERM', 'SIGINT', 'SIGHUP'] as const;
    // Keeps the event loop alive while nobody is connected.
    const alive = setInterval(() => {}, 2 ** 30);
    const stop = () => {
      clearInterval(alive);
      for (const name of signals) process.removeListener(name, stop);
      resolve();
    };
    for (const name of signals) process.on(name, stop);
  });
}
