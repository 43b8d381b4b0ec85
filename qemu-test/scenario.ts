/**
 * What a scenario is: a machine, its devices, what runs inside the guest and on the host, and the checks that must
 * come out. The same file is loaded on both sides, so that the list of checks is one list. Scenarios with the same machine share a guest,
 * one after the other; each has its own devices, and finds none of the others bound to a driver.
 */
import type { Guest } from './guest/guest.ts';
import type { Host } from './host/host.ts';

/** A virtio-net function that QEMU itself implements. */
export interface QemuNic {
  readonly kind: 'virtio-net';
  readonly id: string;
  readonly mac: string;
  /** What the function tells its driver; QEMU offers the MTU feature only when this is given. */
  readonly mtu?: number;
  /** True: its DMA goes through the IOMMU, so that vfio-pci can hand it to a user process. False: the kernel's own NIC. */
  readonly iommu: boolean;
  readonly queuePairs?: number;
  /**
   * Where its frames go: `host` (`Host.link(id)`), `tap` (a tap of its own, behind which the host's kernel is, see `tapAddresses`; the only
   * one that serves several queue pairs), `{ device: ID }` (the link of that software device), or `{ hub: N }` (to the other QEMU
   * functions on the same hub).
   */
  readonly link: 'host' | 'tap' | { readonly device: string } | { readonly hub: number };
  /** More properties of QEMU's device, such as `packed: true`. */
  readonly properties?: Readonly<Record<string, string | number | boolean>>;
  /**
   * Behind a root port of its own (the default); on the root bus, where a function cannot be reset or unplugged; or
   * `{ besides: ID }`: another function of that device, and so in its IOMMU group.
   */
  readonly placement?: 'root-port' | 'root-bus' | { readonly besides: string };
}

/** Our software device (`vipsec device`) as a vfio-user-pci function. */
export interface SoftwareNic {
  readonly kind: 'vfio-user';
  readonly id: string;
  /**
   * `wire`: a Unix socket for the NIC that names this device in its link. `host`: to `Host.link(id)`. `loopback`: what is sent comes back.
   * `{ pair: ID }`: to that function, which names this one; one process has both.
   */
  readonly link: 'wire' | 'host' | 'loopback' | { readonly pair: string };
  /** More arguments of `vipsec device`; of a pair only those of the first. */
  readonly args?: readonly string[];
}

export type ScenarioDevice = QemuNic | SoftwareNic;

export interface Machine {
  /** `stock`: any QEMU from 7.2. `vfioUser`: one that has vfio-user-pci. */
  readonly qemu: 'stock' | 'vfioUser';
  /** Address width of the IOMMU in bits; `none` leaves it out. Default 48. */
  readonly iommu?: 39 | 48 | 'none';
  /** MiB. Default 1024. */
  readonly memory?: number;
  readonly cpus?: number;
}

export interface Scenario {
  /** One line on what it proves. */
  readonly title: string;
  readonly machine: Machine;
  readonly devices: readonly ScenarioDevice[];
  /** Modules that it needs. Those of all scenarios that share a guest are loaded when it boots. */
  readonly modules: readonly string[];
  /** Seconds that it has, without the boot; it fails when it is not over then. */
  readonly timeout: number;
  /** Names of the checks that must be made, each once, and pass. */
  readonly checks: readonly string[];
  /** Lines of the guest's console that would fail the scenario (IOMMU faults, kernel warnings) and that are expected. */
  readonly allowedFaults?: readonly RegExp[];
  /** Runs inside the guest. */
  guest(guest: Guest): Promise<void>;
  /** Runs beside QEMU, at the same time. */
  host?(host: Host): Promise<void>;
}

export interface NamedScenario {
  readonly name: string;
  readonly scenario: Scenario;
}

export interface TapAddresses {
  /** Address and MAC of the host's kernel, which answers echo requests over UDP and TCP. */
  readonly host: string;
  readonly mac: string;
  /** The address that it knows behind the NIC. */
  readonly guest: string;
}

/** Who is who on the tap of NIC `id`: a subnet for each, in a network namespace of the machine's own. */
export function tapAddresses(devices: readonly ScenarioDevice[], id: string): TapAddresses {
  const index = devices.findIndex((device) => device.id === id);
  return { host: `10.8.${index}.1`, mac: `02:00:00:08:00:0${index}`, guest: `10.8.${index}.2` };
}

export const tapName = (id: string): string => `tap-${id}`;

/** PCI function number of device `index` within its slot, and the index of the device whose slot it is. */
export function slotOf(
  devices: readonly ScenarioDevice[],
  index: number,
): { readonly slot: number; readonly fn: number } {
  const device = devices[index];
  const { placement } = device.kind === 'virtio-net' ? device : {};
  if (typeof placement !== 'object') return { slot: index, fn: 0 };
  const slot = devices.findIndex((other) => other.id === placement.besides);
  const mates = devices.slice(slot + 1, index + 1).filter((other) => slotMate(other, placement.besides));
  return { slot, fn: mates.length };
}

function slotMate(device: ScenarioDevice, id: string): boolean {
  return device.kind === 'virtio-net' && typeof device.placement === 'object' && device.placement.besides === id;
}
