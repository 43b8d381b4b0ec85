/**
 * Registers of an octeon_ep class function that take effect when the firmware has acknowledged them, and the capability list in its
 * window.
 */
import { VirtioError } from '../errors.ts';
import type { VirtioCapability } from '../vfio/config-space.ts';
import type { Region } from '../vfio/function.ts';
import { get32 } from './little-endian.ts';
import { AcknowledgeBit, OctepWindow, VendorData } from './octep-layout.ts';
import { CommonCfgField, PCI_CAP_VENDOR, VirtioCapField, VirtioCapLength } from './pci-layout.ts';

/** Reads before the first pause, then pauses of growing length: the firmware looks every 100 µs or so. */
const EAGER_READS = 4;
/** Nobody gives up before so many reads, however long each took. */
const LEAST_READS = 16;
const PAUSE_MS = { first: 0.05, most: 2 } as const;

const bell = new Int32Array(new SharedArrayBuffer(4));

/**
 * Waits, without leaving the call, until `acknowledged`. Throws `VirtioError` ACKNOWLEDGE_TIMEOUT after `timeout` milliseconds: `what` the
 * firmware did not acknowledge.
 */
function awaitAcknowledgement(address: string, what: string, timeout: number, acknowledged: () => boolean): void {
  const deadline = performance.now() + timeout;
  let pause: number = PAUSE_MS.first;
  for (let reads = 0; !acknowledged(); reads++) {
    if (performance.now() >= deadline && reads >= LEAST_READS) {
      throw new VirtioError(
        'ACKNOWLEDGE_TIMEOUT',
        `${address}: the firmware did not acknowledge ${what} in ${timeout} ms`,
        {
          hint: 'The firmware that polls the window has stopped, or this function is not the one that it serves: restart it on the DPU.',
        },
      );
    }
    if (reads < EAGER_READS) continue;
    Atomics.wait(bell, 0, 0, pause);
    pause = Math.min(2 * pause, PAUSE_MS.most);
  }
}

/** Words of features that every firmware has; the words beyond came with Virtio 1.4. */
const OLD_FEATURE_WORDS = 2;

/** The registers of the common configuration that want an acknowledgement. `offset` is where it is in the window. */
export class AcknowledgedRegisters {
  readonly #address: string;
  readonly #window: Region;
  readonly #offset: number;
  /** Milliseconds for each acknowledgement. */
  readonly #timeout: number;

  constructor(address: string, window: Region, offset: number, timeout: number) {
    this.#address = address;
    this.#window = window;
    this.#offset = offset;
    this.#timeout = timeout;
  }

  /** Asks for a reset, which is over when `device_status` reads 0. */
  startReset(): void {
    this.#window.write8(this.#offset + CommonCfgField.deviceStatus, AcknowledgeBit.reset);
  }

  /** Waits for the reset that was asked for: a selection that is made meanwhile is lost. Throws `VirtioError` ACKNOWLEDGE_TIMEOUT. */
  awaitReset(): void {
    this.#await('a reset', () => this.#window.read8(this.#offset + CommonCfgField.deviceStatus) === 0);
  }

  /** `field` is `device_feature_select` or `driver_feature_select`. Throws `VirtioError` ACKNOWLEDGE_TIMEOUT. */
  selectFeatures(field: number, word: number): void {
    const at = this.#offset + field;
    this.#window.write32(at, word | AcknowledgeBit.select);
    this.#await(`the selection of feature word ${word}`, () => this.#window.read32(at) === word);
  }

  /** Throws `VirtioError` ACKNOWLEDGE_TIMEOUT, also for a queue that the firmware does not know. */
  selectQueue(index: number): void {
    const at = this.#offset + CommonCfgField.queueSelect;
    this.#window.write16(at, index | AcknowledgeBit.select);
    this.#await(`the selection of queue ${index}`, () => this.#window.read16(at) === index);
  }

  #await(what: string, acknowledged: () => boolean): void {
    awaitAcknowledgement(this.#address, what, this.#timeout, acknowledged);
  }

  readFeatureWord(word: number): number {
    this.selectFeatures(CommonCfgField.deviceFeatureSelect, word);
    return this.#window.read32(this.#offset + CommonCfgField.deviceFeature);
  }

  /**
   * The words that the device offers, as many as its firmware knows. Firmware of before Virtio 1.4 acknowledges the selection of words 2 and 3 and
   * leaves the word before it in the register, where bit 38 would be taken for bit 70, which is IPsec. So word 2 is read behind word 0 and
   * behind word 1: what is the same as either is no word of its own.
   */
  readFeatureWords(): number[] {
    const first = this.readFeatureWord(0);
    const third = this.readFeatureWord(2);
    const second = this.readFeatureWord(1);
    const again = this.readFeatureWord(2);
    if (third === first && again === second) return [first, second];
    return [first, second, third, this.readFeatureWord(OLD_FEATURE_WORDS + 1)];
  }
}

/**
 * The capabilities in the window, read byte by byte: the firmware puts them at any address. `extra` of a vendor capability is what follows
 * its 16 bytes. Throws `VirtioError` OCTEP_CAPABILITIES for a list that loops, leaves the window, or names something else.
 */
export function readWindowCapabilities(address: string, window: Region): VirtioCapability[] {
  const refuse = (what: string): VirtioError => new VirtioError('OCTEP_CAPABILITIES', `${address}: ${what}`);
  const found: VirtioCapability[] = [];
  const seen = new Set<number>();
  for (let at = window.read8(OctepWindow.capabilities); at !== 0; at = window.read8(at + VirtioCapField.next)) {
    if (at <= OctepWindow.capabilities) throw refuse(`a capability at ${hex(at)}, inside the window's header`);
    if (seen.has(at)) throw refuse(`the capability at ${hex(at)} leads back to itself`);
    seen.add(at);
    if (at + VirtioCapLength.plain > window.size) throw refuse(`the capability at ${hex(at)} leaves the window`);
    const kind = window.read8(at + VirtioCapField.vendor);
    if (kind !== PCI_CAP_VENDOR) throw refuse(`capability ${hex(kind)} at ${hex(at)} in a list of vendor capabilities`);
    const length = window.read8(at + VirtioCapField.length);
    if (length < VirtioCapLength.plain || at + length > window.size) {
      throw refuse(`the capability at ${hex(at)} has ${length} bytes`);
    }
    const bytes = Uint8Array.from({ length }, (_, i) => window.read8(at + i));
    found.push({
      at,
      type: bytes[VirtioCapField.cfgType],
      bar: bytes[VirtioCapField.bar],
      id: bytes[VirtioCapField.id],
      offset: get32(bytes, VirtioCapField.offset),
      length: get32(bytes, VirtioCapField.structureLength),
      extra: bytes.slice(VirtioCapLength.plain),
    });
  }
  return found;
}

/** What a vendor capability of the window says (4.1.4.8): its fields overlap those of the others. */
export function readVendorData(window: Region, at: number): { vendorId: number; id: number; data: number } {
  return {
    vendorId: window.read8(at + VendorData.vendorId) | (window.read8(at + VendorData.vendorId + 1) << 8),
    id: window.read8(at + VendorData.id),
    data: window.read8(at + VendorData.data),
  };
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
