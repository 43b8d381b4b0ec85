/** The QEMU command line of a guest: the machine that its scenarios need, and the devices of all of them. */
import { join } from 'node:path';
import type { Components } from '../fetch/components.ts';
import { FIRST_ROOT_PORT_SLOT, MAX_DEVICES } from '../guest/guest.ts';
import type { GuestImage } from '../image/build.ts';
import { type Machine, type NamedScenario, type QemuNic, type ScenarioDevice, slotOf, tapName } from '../scenario.ts';
import { hasTaps, type TapSupport, withTaps } from './taps.ts';

const DEFAULT_MEMORY = 1024;
const DEFAULT_CPUS = 1;
/** More than one, whatever the machine has: QEMU leaves out memory barriers when there can be no other processor, but there is the device. */
const MAX_CPUS = 4;
/**
 * All that QEMU can emulate, but what makes the kernel copy and clear memory by string instructions, byte by byte in emulation, and page
 * tables of five levels.
 */
const CPU = 'max,-erms,-fsrm,-la57';
/** Of 2 MiB: a NIC's memory in 4-KiB pages would be mapped, and told of to a device process, a thousand times. */
const HUGE_PAGES = 32;
/** On the root bus, above all devices of scenarios. */
const BASE_SLOT = `0x${(FIRST_ROOT_PORT_SLOT + MAX_DEVICES).toString(16)}`;
/** Numbers that a scenario has for its hubs. */
const HUBS = 16;
const IRQ_REMAPPING = 'kernel-irqchip=split';

export interface MachinePaths {
  readonly image: GuestImage;
  /** Folder for the sockets of this run. */
  readonly sockets: string;
  /** Folder of the built package inside the guest, below `/app`. */
  readonly guestDist: string;
  /** Folder of the built package on the host. */
  readonly dist: string;
  /** How taps are had; needed when a device has one. */
  readonly taps?: TapSupport | undefined;
  /** Folder for a capture of each QEMU function's frames. */
  readonly capture?: string | undefined;
}

export interface CommandLine {
  readonly command: string;
  readonly args: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

export const controlSocket = (sockets: string) => join(sockets, 'control');
export const qmpSocket = (sockets: string) => join(sockets, 'qmp');
export const linkSocket = (sockets: string, unique: string) => join(sockets, `link-${unique}`);
export const deviceSocket = (sockets: string, unique: string) => join(sockets, `device-${unique}`);
/** Device `id` of scenario `name` among those of all scenarios of the guest. */
export const unique = (name: string, id: string) => `${name}.${id}`;

/** Place of the first device of scenario `name` among those of the guest. */
export function firstPlace(scenarios: readonly NamedScenario[], name: string): number {
  const before = scenarios.slice(
    0,
    scenarios.findIndex((one) => one.name === name),
  );
  return before.reduce((sum, { scenario }) => sum + scenario.devices.length, 0);
}

/** For scenarios whose machines differ in their memory only; at most one of them has taps. */
export function commandLine(
  scenarios: readonly NamedScenario[],
  parts: Components,
  paths: MachinePaths,
  interactive: boolean,
): CommandLine {
  const { machine } = scenarios[0].scenario;
  const { sockets } = paths;
  const program = parts.qemu[machine.qemu];
  const args = [
    ...program.args,
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
    ...['-machine', `q35,${IRQ_REMAPPING}`, '-accel', 'tcg,thread=multi', '-cpu', CPU],
    ...['-smp', `${machine.cpus ?? DEFAULT_CPUS},maxcpus=${MAX_CPUS}`],
    ...memory(scenarios),
    ...iommu(machine),
    ...['-kernel', parts.kernel, '-initrd', paths.image.initramfs],
    ...['-drive', `if=none,id=base,file=${paths.image.base},format=raw,readonly=on`],
    ...['-device', `nvme,drive=base,serial=base,addr=${BASE_SLOT}`],
    ...['-append', kernelArguments(scenarios, paths.guestDist, interactive)],
    ...['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console'],
    ...['-chardev', `socket,id=control,path=${controlSocket(sockets)}`, '-serial', 'chardev:control'],
    ...['-qmp', `unix:${qmpSocket(sockets)}`],
    ...scenarios.flatMap((_, index) => functionsOf(scenarios, index, paths)),
  ];
  const qemu = [program.command, ...args];
  const tapped = scenarios.find(({ scenario }) => hasTaps(scenario.devices))?.scenario.devices ?? [];
  if (tapped.length > 0 && paths.taps === undefined) throw new Error('there are no taps');
  const isAlone = tapped.length === 0 || paths.taps === undefined;
  const [command, ...rest] = isAlone ? qemu : withTaps(qemu, tapped, paths.taps, paths.dist);
  return { command, args: rest, env: program.env ?? {} };
}

function functionsOf(scenarios: readonly NamedScenario[], index: number, { sockets, capture }: MachinePaths): string[] {
  const { name, scenario } = scenarios[index];
  const part = { name, devices: scenario.devices, first: firstPlace(scenarios, name), firstHub: index * HUBS, sockets };
  return scenario.devices.flatMap(({ id, kind }, device) => {
    const args = pciFunction(part, device);
    if (capture === undefined || kind !== 'virtio-net') return args;
    const own = unique(name, id);
    const file = join(capture, `${name}-${id}.pcap`);
    return [...args, '-object', `filter-dump,id=dump-${own},netdev=net-${own},file=${file}`];
  });
}

function kernelArguments(scenarios: readonly NamedScenario[], guestDist: string, interactive: boolean): string {
  const options = ['console=ttyS0', 'loglevel=7', 'panic=-1', 'nokaslr', 'random.trust_cpu=on', 'mitigations=off'];
  // Other clocks cost an emulated machine an access to a device each time they are read.
  options.push('tsc=reliable', 'init_on_alloc=0', `hugepages=${HUGE_PAGES}`);
  // Checks of the kernel's that have nothing to do with ours: that timers tick and tasks run in time, which a guest without its share of a
  // busy machine fails, and known answers for each algorithm, which take emulation seconds.
  options.push('no_timer_check', 'nowatchdog', 'rcupdate.rcu_cpu_stall_suppress=1', 'cryptomgr.notests=1');
  if (scenarios[0].scenario.machine.iommu !== 'none') options.push('intel_iommu=on');
  const modules = new Set(scenarios.flatMap(({ scenario }) => scenario.modules));
  options.push(`vipsec.dist=${guestDist}`, `vipsec.modules=${[...modules].join(',')}`);
  if (interactive) options.push('vipsec.interactive=1');
  return options.join(' ');
}

function memory(scenarios: readonly NamedScenario[]): string[] {
  const size = Math.max(...scenarios.map(({ scenario }) => scenario.machine.memory ?? DEFAULT_MEMORY));
  const { qemu } = scenarios[0].scenario.machine;
  // A device process maps guest memory, so it must be a file that can be passed on.
  if (qemu === 'stock') return ['-m', `${size}M`];
  const backend = `memory-backend-memfd,id=mem0,size=${size}M,share=on`;
  return ['-m', `${size}M`, '-object', backend, '-numa', 'node,memdev=mem0'];
}

function iommu({ iommu: width = 48 }: Machine): string[] {
  return width === 'none' ? [] : ['-device', `intel-iommu,intremap=on,caching-mode=on,aw-bits=${width}`];
}

/** A scenario's share of the machine. */
interface Part {
  readonly name: string;
  readonly devices: readonly ScenarioDevice[];
  /** Place of its first device. */
  readonly first: number;
  readonly firstHub: number;
  readonly sockets: string;
}

function pciFunction(part: Part, index: number): string[] {
  const { name, devices, first, sockets } = part;
  const device = devices[index];
  const id = unique(name, device.id);
  const { slot: owner, fn } = slotOf(devices, index);
  const slot = `0x${(FIRST_ROOT_PORT_SLOT + first + owner).toString(16)}`;
  const onRootBus = device.kind === 'virtio-net' && device.placement === 'root-bus';
  const place = onRootBus ? { addr: slot } : { bus: `port-${unique(name, devices[owner].id)}`, addr: `0x0.${fn}` };
  const chassis = first + index + 1;
  const port = onRootBus || fn > 0 ? [] : ['-device', `pcie-root-port,id=port-${id},chassis=${chassis},addr=${slot}`];
  if (device.kind === 'vfio-user') {
    const socket = { type: 'unix', path: deviceSocket(sockets, id) };
    return [...port, '-device', JSON.stringify({ driver: 'vfio-user-pci', id, rombar: 0, socket, ...place })];
  }
  const shared = devices.some((_, other) => other !== index && slotOf(devices, other).slot === owner);
  const netdev = backend(device, part);
  const properties = {
    driver: 'virtio-net-pci',
    id,
    netdev: netdev.id,
    mac: device.mac,
    romfile: '',
    'disable-legacy': 'on',
    ...(device.iommu ? { iommu_platform: true } : {}),
    ...(device.mtu === undefined ? {} : { host_mtu: device.mtu }),
    ...(device.queuePairs === undefined ? {} : { mq: true, vectors: 2 * device.queuePairs + 2 }),
    ...(shared && fn === 0 ? { multifunction: true } : {}),
    ...place,
    ...device.properties,
  };
  return [...port, '-netdev', JSON.stringify(netdev), '-device', JSON.stringify(properties)];
}

/** Where the frames of a NIC go. Two NICs that are wired together sit on one hub, numbered by whichever comes first. */
function backend(
  { id, link, queuePairs: queues = 1 }: QemuNic,
  { name, firstHub, sockets }: Part,
): { id: string } & Record<string, unknown> {
  const netdev = `net-${unique(name, id)}`;
  if (typeof link === 'object' && 'hub' in link) return { type: 'hubport', id: netdev, hubid: firstHub + link.hub };
  if (link === 'tap') {
    const ifname = tapName(id);
    return { type: 'tap', id: netdev, ifname, script: 'no', downscript: 'no', vhost: false, queues };
  }
  const path = linkSocket(sockets, unique(name, link === 'host' ? id : link.device));
  return { type: 'stream', id: netdev, server: false, addr: { type: 'unix', path } };
}
