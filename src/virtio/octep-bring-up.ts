/**
 * The first steps with an octeon_ep class function, from its ids to its virtio structures: what is read, and what must be there.
 *
 * `openOctepTransport` takes them, and throws at the first that fails; the bring-up report shows each. Nothing of the device is changed but
 * its ready mark, which is taken. Source: Linux, drivers/vdpa/octeon_ep.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { VipsecError, VirtioError } from '../errors.ts';
import { PciCommand, readIdentity, updateCommand, type VirtioCapability } from '../vfio/config-space.ts';
import type { PciFunction, Region } from '../vfio/function.ts';
import {
  InterruptCount,
  OctepBar,
  OctepId,
  OctepRegister,
  OctepWindow,
  octepModel,
  READY_MARK,
  VendorData,
  WINDOW_SIGNATURE,
} from './octep-layout.ts';
import { readVendorData, readWindowCapabilities } from './octep-registers.ts';
import { CommonCfgLength, DeviceType, VirtioCfgType } from './pci-layout.ts';
import { findStructure, type Structure } from './structures.ts';

/** One step, as it went. */
export interface BringUpStep {
  readonly step: string;
  readonly expected: string;
  /** What was read, or how that failed. */
  readonly read: string;
  readonly ok: boolean;
  readonly hint?: string;
}

export interface OctepParts {
  readonly deviceType: number;
  /** Interrupts that the function has, 1 to 8. */
  readonly interrupts: number;
  readonly window: Region;
  readonly common: Structure;
  readonly notify: Structure;
  readonly isr: Structure;
  readonly config: Structure;
  readonly capabilities: readonly VirtioCapability[];
}

export interface OctepOptions {
  /** Milliseconds to wait for the ready mark. Default 5000, as long as Linux waits. */
  readonly readyTimeout?: number;
  /** Milliseconds for each acknowledgement of the firmware. Default 10000. */
  readonly acknowledgeTimeout?: number;
  /** Told of each step, also of the one that fails. */
  readonly onStep?: (step: BringUpStep) => void;
}

export const DEFAULT_READY_TIMEOUT = 5000;
/** Pace at which the ready mark is looked for. */
const READY_PACE_MS = 1;
/** A window without room for the structures and one page of notifications is none. */
const WINDOW_MIN = 0x2000;

const HINT = {
  ids: 'A function that is not in this list is not of this class; vipsec devices lists the functions of this host.',
  physical:
    'The physical function carries the virtual ones and is not driven itself: bind it to octep_vdpa, create virtual functions, and take one of them.',
  registers: 'BAR 0 holds the mailbox: the function was probably not given its BARs. Look at lspci -vv.',
  window:
    'The driver of the physical function (octep_vdpa) gives each virtual function its part of its own BAR 4 when sriov_numvfs is written. Do that with sriov_drivers_autoprobe 0, and bind vfio-pci afterwards: octep_vdpa takes the part back when it lets go of a virtual function.',
  ready:
    'The driver of the physical function leaves the mark when it has created the virtual functions. Create them again (sriov_numvfs 0, then N) with octep_vdpa bound to the physical function.',
  signature:
    'The ids are also those of a plain NIC: start the virtio application of the DPU (for DAO, dao-virtio-l2fwd) before the virtual functions are created.',
  interrupts:
    'The number of rings of a virtual function is set on the DPU (SDP_EPF_RINFO, rings per virtual function).',
  capabilities:
    'The firmware writes the list when it starts: a broken one means that it is of another version, or did not finish.',
  type: 'The firmware emulates another kind of virtio device on this function.',
} as const;

/** What the steps are told of and fail with. */
class Walk {
  readonly #address: string;
  readonly #onStep: (step: BringUpStep) => void;

  constructor(address: string, onStep: ((step: BringUpStep) => void) | undefined) {
    this.#address = address;
    this.#onStep = onStep ?? (() => {});
  }

  passed(step: string, expected: string, read: string): void {
    this.#onStep({ step, expected, read, ok: true });
  }

  failed(step: string, expected: string, read: string, code: string, hint: string): VirtioError {
    this.#onStep({ step, expected, read, ok: false, hint });
    return new VirtioError(code, `${this.#address}: ${step}: ${read}, not ${expected}`, { hint });
  }

  /** What the function itself refuses is a step that failed, too. */
  attempt<T>(step: string, expected: string, hint: string, work: () => T): T {
    try {
      return work();
    } catch (error) {
      if (error instanceof VipsecError) this.#onStep({ step, expected, read: error.message, ok: false, hint });
      throw error;
    }
  }
}

/**
 * Takes the function from its ids to its structures. Enables memory space and bus mastering. Throws `VirtioError` NOT_VIRTIO, OCTEP_PHYSICAL, OCTEP_BAR,
 * OCTEP_NOT_READY, OCTEP_SIGNATURE, OCTEP_INTERRUPTS, OCTEP_CAPABILITIES, OCTEP_VENDOR_DATA, STRUCTURE_MISSING and STRUCTURE_BOUNDS, and `VfioError`.
 */
export async function bringUpOctep(fn: PciFunction, options: OctepOptions = {}): Promise<OctepParts> {
  const walk = new Walk(fn.address, options.onStep);
  checkIdentity(fn, walk);
  updateCommand(fn.config, PciCommand.memorySpace | PciCommand.busMaster);

  const { registers, window } = checkBars(fn, walk);
  await takeReadyMark(registers, window, options.readyTimeout ?? DEFAULT_READY_TIMEOUT, walk);

  const signature = [window.read32(OctepWindow.signature), window.read32(OctepWindow.signature + 4)];
  const expected = WINDOW_SIGNATURE.map(hex).join(' ');
  const read = signature.map(hex).join(' ');
  const step = `firmware signature (BAR 4 + ${hex(OctepWindow.signature)})`;
  if (!hasSignature(window)) throw walk.failed(step, expected, read, 'OCTEP_SIGNATURE', HINT.signature);
  walk.passed(step, expected, read);

  const interrupts = readInterrupts(fn, registers, walk);
  const structures = findStructures(fn, window, walk);
  return { interrupts, window, ...structures };
}

function checkIdentity(fn: PciFunction, walk: Walk): void {
  const identity = readIdentity(fn.config);
  const model = octepModel(identity);
  const ids = `${hex4(identity.vendorId)}:${hex4(identity.deviceId)}`;
  const expected = `a virtual function ${hex4(OctepId.vendor)}:{${OctepId.models.map(({ virtual }) => hex4(virtual)).join(', ')}}`;
  const step = 'PCI ids';
  if (model === null) throw walk.failed(step, expected, ids, 'NOT_VIRTIO', HINT.ids);
  const read = `${ids}, a ${model.virtual ? 'virtual' : 'physical'} function of ${model.name}`;
  if (!model.virtual) throw walk.failed(step, expected, read, 'OCTEP_PHYSICAL', HINT.physical);
  walk.passed(step, expected, read);
}

function checkBars(fn: PciFunction, walk: Walk): { registers: Region; window: Region } {
  const registers = fn.bar(OctepBar.registers);
  const window = fn.bar(OctepBar.window);
  for (const [name, bar, least, hint] of [
    ['registers (BAR 0)', registers, OctepRegister.end, HINT.registers],
    ['virtio window (BAR 4)', window, WINDOW_MIN, HINT.window],
  ] as const) {
    const expected = `${hex(least)} bytes or more`;
    const read = bar.size === 0 ? 'absent' : `${hex(bar.size)} bytes`;
    if (bar.size < least) throw walk.failed(name, expected, read, 'OCTEP_BAR', hint);
    walk.passed(name, expected, read);
  }
  return { registers, window };
}

/**
 * Waits for the mark and takes it, once. A driver that comes later finds 0 there, but the signature in the window: the mark only says that
 * the window may be looked at.
 */
async function takeReadyMark(registers: Region, window: Region, timeout: number, walk: Walk): Promise<void> {
  const { ready } = OctepRegister;
  const step = `ready mark (BAR 0 + ${hex(ready)})`;
  const expected = hex(READY_MARK);
  const deadline = performance.now() + timeout;
  for (;;) {
    const mark = registers.read32(ready);
    if (mark === READY_MARK) {
      registers.write32(ready, 0);
      registers.write32(ready + 4, 0);
      walk.passed(step, expected, hex(mark));
      return;
    }
    if (mark === 0 && hasSignature(window)) {
      walk.passed(step, expected, '0x0: taken by an earlier driver, the window has its signature');
      return;
    }
    if (performance.now() >= deadline) {
      throw walk.failed(step, expected, `${hex(mark)} for ${timeout} ms`, 'OCTEP_NOT_READY', HINT.ready);
    }
    await sleep(READY_PACE_MS);
  }
}

function hasSignature(window: Region): boolean {
  return WINDOW_SIGNATURE.every((value, i) => window.read32(OctepWindow.signature + 4 * i) === value);
}

function readInterrupts(fn: PciFunction, registers: Region, walk: Walk): number {
  const { inputControl } = OctepRegister;
  const { shift, mask, max } = InterruptCount;
  const count = (registers.read32(inputControl + 4) >>> shift) & mask;
  const step = `interrupts (BAR 0 + ${hex(inputControl)}, bits 51:48)`;
  const most = Math.min(max, fn.interruptVectors);
  const expected = fn.interruptVectors === 0 ? `1 to ${max}` : `1 to ${most}`;
  // A function without MSI-X can still be polled.
  if (count < 1 || count > max || (fn.interruptVectors > 0 && count > fn.interruptVectors)) {
    throw walk.failed(step, expected, String(count), 'OCTEP_INTERRUPTS', HINT.interrupts);
  }
  walk.passed(step, expected, String(count));
  return count;
}

/** Fewest bytes of each structure: one byte, a queue's notification with its cause flag, and what `common` cannot do without. */
const STRUCTURES = [
  ['common', 'common configuration', VirtioCfgType.COMMON, CommonCfgLength.required, 4],
  ['notify', 'notification', VirtioCfgType.NOTIFY, 8, 4],
  ['isr', 'ISR status', VirtioCfgType.ISR, 1, 1],
  ['config', 'device configuration', VirtioCfgType.DEVICE, 1, 1],
] as const;

function findStructures(fn: PciFunction, window: Region, walk: Walk): Omit<OctepParts, 'interrupts' | 'window'> {
  const listStep = `capability list (BAR 4 + ${hex(OctepWindow.capabilities)})`;
  const listExpected = 'COMMON, NOTIFY, ISR, DEVICE and VENDOR, all of them in BAR 4';
  const capabilities = walk.attempt(listStep, listExpected, HINT.capabilities, () => {
    const list = readWindowCapabilities(fn.address, window);
    const elsewhere = list.find(({ type, bar }) => type !== VirtioCfgType.VENDOR && bar !== OctepBar.window);
    if (elsewhere !== undefined) {
      const where = `structure ${elsewhere.type} is in BAR ${elsewhere.bar}, not in BAR ${OctepBar.window}`;
      throw new VirtioError('OCTEP_CAPABILITIES', `${fn.address}: ${where}`, { hint: HINT.capabilities });
    }
    return list;
  });
  walk.passed(listStep, listExpected, capabilities.map(({ type, at }) => `${nameOf(type)} at ${hex(at)}`).join(', '));

  const find = ([, name, type, least, alignment]: (typeof STRUCTURES)[number]): Structure => {
    const step = `${name} structure`;
    const expected = `${least} bytes or more, inside BAR 4`;
    const structure = walk.attempt(step, expected, HINT.capabilities, () =>
      findStructure(fn, capabilities, name, type, least, alignment),
    );
    walk.passed(step, expected, `${structure.length} bytes at ${hex(structure.offset)}`);
    return structure;
  };
  const [common, notify, isr, config] = STRUCTURES.map(find);
  return { common, notify, isr, config, capabilities, deviceType: readDeviceType(window, capabilities, walk) };
}

/** The virtio device type, which the PCI ids do not tell. Firmware of before that capability emulates network devices only. */
function readDeviceType(window: Region, capabilities: readonly VirtioCapability[], walk: Walk): number {
  const step = 'virtio device type (vendor capability)';
  const expected = `${DeviceType.NET}, of vendor ${hex4(OctepId.vendor)}`;
  const capability = capabilities.find(({ type }) => type === VirtioCfgType.VENDOR);
  if (capability === undefined) {
    walk.passed(step, expected, 'no such capability: older firmware, which has network devices only');
    return DeviceType.NET;
  }
  const { vendorId, id, data } = readVendorData(window, capability.at);
  const read = `${data}, of vendor ${hex4(vendorId)}`;
  if (vendorId !== OctepId.vendor || id !== VendorData.deviceType) {
    throw walk.failed(step, expected, `${read}, id ${id}`, 'OCTEP_VENDOR_DATA', HINT.capabilities);
  }
  if (data === DeviceType.NET) walk.passed(step, expected, read);
  else throw walk.failed(step, expected, read, 'NOT_A_NIC', HINT.type);
  return data;
}

function nameOf(type: number): string {
  return Object.entries(VirtioCfgType).find(([, value]) => value === type)?.[0] ?? hex(type);
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}

function hex4(value: number): string {
  return value.toString(16).padStart(4, '0');
}
