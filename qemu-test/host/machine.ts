/** The QEMU command line of a scenario. */
import { join } from 'node:path';
import type { Components } from '../fetch/components.ts';
import { FIRST_ROOT_PORT_SLOT } from '../guest/guest.ts';
import type { GuestImage } from '../image/build.ts';
import { type Machine, type QemuNic, type Scenario, type ScenarioDevice, slotOf, tapName } from '../scenario.ts';
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
/** On the root bus, above all devices of a scenario. */
const BASE_SLOT = '0x1e';
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
export const linkSocket = (sockets: string, id: string) => join(sockets, `link-${id}`);
export const deviceSocket = (sockets: string, id: string) => join(sockets, `device-${id}`);

export function commandLine(
  name: string,
  scenario: Scenario,
  parts: Components,
  paths: MachinePaths,
  interactive: boolean,
): CommandLine {
  const { machine, devices } = scenario;
  const { sockets } = paths;
  const program = parts.qemu[machine.qemu];
  const args = [
    ...program.args,
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
    ...['-machine', `q35,${IRQ_REMAPPING}`, '-accel', 'tcg,thread=multi', '-cpu', CPU],
    ...['-smp', `${machine.cpus ?? DEFAULT_CPUS},maxcpus=${MAX_CPUS}`],
    ...memory(machine),
    ...iommu(machine),
    ...['-kernel', parts.kernel, '-initrd', paths.image.initramfs],
    ...['-drive', `if=none,id=base,file=${paths.image.base},format=raw,readonly=on`],
    ...['-device', `nvme,drive=base,serial=base,addr=${BASE_SLOT}`],
    ...['-append', kernelArguments(name, scenario, paths.guestDist, interactive)],
    ...['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console'],
    ...['-chardev', `socket,id=control,path=${controlSocket(sockets)}`, '-serial', 'chardev:control'],
    ...['-qmp', `unix:${qmpSocket(sockets)}`],
  ];
  for (const [index, { id, kind }] of devices.entries()) {
    args.push(...pciFunction(devices, index, sockets));
    if (paths.capture === undefined || kind !== 'virtio-net') continue;
    args.push(
      '-object',
      `filter-dump,id=dump-${id},netdev=net-${id},file=${join(paths.capture, `${name}-${id}.pcap`)}`,
    );
  }
  const qemu = [program.command, ...args];
  if (hasTaps(devices) && paths.taps === undefined) throw new Error('there are no taps');
  const [command, ...rest] = paths.taps === undefined ? qemu : withTaps(qemu, devices, paths.taps, paths.dist);
  return { command, args: rest, env: program.env ?? {} };
}

function kernelArguments(
  name: string,
  { machine, modules }: Scenario,
  guestDist: string,
  interactive: boolean,
): string {
  const options = ['console=ttyS0', 'loglevel=7', 'panic=-1', 'nokaslr', 'random.trust_cpu=on', 'mitigations=off'];
  // Other clocks cost an emulated machine an access to a device each time they are read.
  options.push('tsc=reliable', 'init_on_alloc=0', `hugepages=${HUGE_PAGES}`);
  // Checks of the kernel's that have nothing to do with ours: that timers tick and tasks run in time, which a guest without its share of a
  // busy machine fails, and known answers for each algorithm, which take emulation seconds.
  options.push('no_timer_check', 'nowatchdog', 'rcupdate.rcu_cpu_stall_suppress=1', 'cryptomgr.notests=1');
  if (machine.iommu !== 'none') options.push('intel_iommu=on');
  options.push(`vipsec.scenario=${name}`, `vipsec.dist=${guestDist}`);
  if (modules.length > 0) options.push(`vipsec.modules=${modules.join(',')}`);
  if (interactive) options.push('vipsec.interactive=1');
  return options.join(' ');
}

function memory({ qemu, memory: size = DEFAULT_MEMORY }: Machine): string[] {
  // A device process maps guest memory, so it must be a file that can be passed on.
  if (qemu === 'stock') return ['-m', `${size}M`];
  const backend = `memory-backend-memfd,id=mem0,size=${size}M,share=on`;
  return ['-m', `${size}M`, '-object', backend, '-numa', 'node,memdev=mem0'];
}

function iommu({ iommu: width = 48 }: Machine): string[] {
  return width === 'none' ? [] : ['-device', `intel-iommu,intremap=on,caching-mode=on,aw-bits=${width}`];
}

function pciFunction(devices: readonly ScenarioDevice[], index: number, sockets: string): string[] {
  const device = devices[index];
  const { slot: owner, fn } = slotOf(devices, index);
  const slot = `0x${(FIRST_ROOT_PORT_SLOT + owner).toString(16)}`;
  const onRootBus = device.kind === 'virtio-net' && device.placement === 'root-bus';
  const place = onRootBus ? { addr: slot } : { bus: `port-${devices[owner].id}`, addr: `0x0.${fn}` };
  const port =
    onRootBus || fn > 0 ? [] : ['-device', `pcie-root-port,id=port-${device.id},chassis=${index + 1},addr=${slot}`];
  if (device.kind === 'vfio-user') {
    const socket = { type: 'unix', path: deviceSocket(sockets, device.id) };
    return [
      ...port,
      '-device',
      JSON.stringify({ driver: 'vfio-user-pci', id: device.id, rombar: 0, socket, ...place }),
    ];
  }
  const shared = devices.some((_, other) => other !== index && slotOf(devices, other).slot === owner);
  const netdev = backend(device, sockets);
  const properties = {
    driver: 'virtio-net-pci',
    id: device.id,
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
  sockets: string,
): { id: string } & Record<string, unknown> {
  const name = `net-${id}`;
  if (typeof link === 'object' && 'hub' in link) return { type: 'hubport', id: name, hubid: link.hub };
  if (link === 'tap') {
    const ifname = tapName(id);
    return { type: 'tap', id: name, ifname, script: 'no', downscript: 'no', vhost: false, queues };
  }
  const path = linkSocket(sockets, link === 'host' ? id : link.device);
  return { type: 'stream', id: name, server: false, addr: { type: 'unix', path } };
}
