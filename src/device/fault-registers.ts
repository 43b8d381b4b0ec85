/**
 * How the faults of `faults.ts` that concern the common configuration structure are made: rules around its registers.
 */
import { DeviceStatus, CommonCfgField as F, NO_VECTOR } from '../virtio/pci-layout.ts';
import { NetConfigField } from '../virtio-net/config.ts';
import type { FaultName, FaultSet } from './faults.ts';

/** Access to the registers as they are. */
export interface Registers {
  read(at: number, width: number): number;
  write(at: number, width: number, value: number): void;
}

/** What differs: what a register reads as, and what a write does. */
interface Rule {
  read?(at: number, value: number): number;
  write?(at: number, width: number, value: number): void;
}

const VECTORS: readonly number[] = [F.configMsixVector, F.queueMsixVector];
const AREAS: readonly number[] = [F.queueDesc, F.queueDriver, F.queueDevice];

/** The register `field` reads as `change` says. */
function reads(field: number | readonly number[], change: (value: number) => number): () => Rule {
  const fields = [field].flat();
  return () => ({ read: (at, value) => (fields.includes(at) ? change(value) : value) });
}

/** Writes to the register `field` become what `change` says; null: nothing. */
function writes(
  field: number | readonly number[],
  change: (value: number) => number | null,
): (registers: Registers) => Rule {
  const fields = [field].flat();
  return (registers) => ({
    write: (at, width, value) => {
      const written = fields.includes(at) ? change(value) : value;
      if (written !== null) registers.write(at, width, written);
    },
  });
}

const { ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, SUSPEND } = DeviceStatus;

/** `device_status` as of a device that suspends itself, while the real one works on; `resumes`: and comes back (3.4). */
function suspends(registers: Registers, resumes: boolean): Rule {
  let suspended = false;
  return {
    read: (at, value) => (at === F.deviceStatus && suspended ? (value | SUSPEND) & ~DRIVER_OK : value),
    write: (at, width, value) => {
      if (at === F.deviceStatus && suspended) suspended = value !== 0 && !(resumes && (value & DRIVER_OK) !== 0);
      else if (at === F.deviceStatus) suspended = (value & SUSPEND) !== 0;
      registers.write(at, width, value);
    },
  };
}

/** Makes the rule of each fault, with a state of its own. */
const RULES: Partial<Record<FaultName, (registers: Registers) => Rule>> = {
  'queue-size-zero': reads(F.queueSize, () => 0),
  'queue-size-odd': reads(F.queueSize, (value) => (value === 0 ? 0 : 255)),
  'queue-size-any': reads(F.queueSize, (value) => (value === 0 ? 64 : value)),
  'notify-outside-bar': reads(F.queueNotifyOff, () => 0xffff),
  'reset-stuck': reads(F.deviceStatus, (value) => value | ACKNOWLEDGE),
  'features-ok-always': reads(F.deviceStatus, (value) =>
    value === (ACKNOWLEDGE | DRIVER) ? value | FEATURES_OK : value,
  ),
  'driver-feature-zero': reads(F.driverFeature, () => 0),
  'queue-enable-one': reads(F.queueEnable, () => 1),
  'queue-reset-one': reads(F.queueReset, () => 1),
  'admin-index-zero': reads(F.adminQueueIndex, () => 0),
  'admin-num-high': reads(F.adminQueueNum, () => 0xffff),
  'vector-sticks': reads(VECTORS, (value) => (value === NO_VECTOR ? 0 : value)),
  'vector-zero-only': reads(VECTORS, (value) => (value === 0 ? 0 : NO_VECTOR)),
  'vector-wrong': reads(VECTORS, (value) => (value === NO_VECTOR ? value : value + 1)),
  'vector-any': (registers) => {
    const written = new Map<number, number>();
    return {
      read: (at, value) => (VECTORS.includes(at) ? (written.get(at) ?? value) : value),
      write: (at, width, value) => {
        written.set(at, value);
        registers.write(at, width, value);
      },
    };
  },
  'vector-kept': writes(VECTORS, (value) => (value === NO_VECTOR ? null : value)),
  'queue-reset-ignored': writes(F.queueReset, () => null),
  'feature-wraps': writes(F.deviceFeatureSelect, (value) => value & 3),
  'address-halves': (registers) => ({
    write: (at, width, value) => {
      registers.write(at, width, value);
      if (AREAS.includes(at)) registers.write(at + 4, 4, 0);
    },
  }),
  'reset-keeps-features': (registers) => {
    let features = 0;
    return {
      read: (at, value) => (at === F.driverFeature ? features : value),
      write: (at, width, value) => {
        if (at === F.driverFeature) features = Math.max(features, value);
        registers.write(at, width, value);
      },
    };
  },
  'suspend-fake': (registers) => suspends(registers, true),
  'suspend-for-good': (registers) => suspends(registers, false),
  'features-once': (registers) => {
    let times = 0;
    return {
      write: (at, width, value) => {
        const again = at === F.deviceStatus && (value & FEATURES_OK) !== 0 && (value & DeviceStatus.DRIVER_OK) === 0;
        if (again && ++times % 2 === 0) registers.write(at, width, value & ~FEATURES_OK);
        else registers.write(at, width, value);
      },
    };
  },
};

type ConfigRule = (at: number, value: number, status: number) => number;

/** The field of the network configuration reads as `value`. */
function configReads(field: number, value: number): () => ConfigRule {
  return () => (at, was) => (at === field ? value : was);
}

/** The field reads one more each time. */
function configCounts(field: number): () => ConfigRule {
  let count = 0;
  return () => (at, was) => (at === field ? was + count++ : was);
}

const CONFIG: Partial<Record<FaultName, () => ConfigRule>> = {
  'config-late': () => (_, value, status) => ((status & FEATURES_OK) === 0 ? 0 : value),
  'config-mtu-low': configReads(NetConfigField.mtu, 60),
  'config-mtu-changes': configCounts(NetConfigField.mtu),
  'config-speed': configReads(NetConfigField.speed, 0x80000000),
  'config-speed-changes': configCounts(NetConfigField.speed),
  'config-duplex': configReads(NetConfigField.duplex, 7),
  'mq-zero-pairs': configReads(NetConfigField.maxVirtqueuePairs, 0),
  'rss-without-room': () => (at, value) => (at >= NetConfigField.rssMaxKeySize ? 0 : value),
};

/** What a read of the network configuration gives with the faults. */
export function configFaults(faults: FaultSet): ConfigRule | null {
  const rules = [...faults].flatMap((name) => CONFIG[name]?.() ?? []);
  if (rules.length === 0) return null;
  return (at, value, status) => rules.reduce((read, rule) => rule(at, read, status), value);
}

/** `registers` with the rules of `faults` around them. */
export function withRegisterFaults(registers: Registers, faults: FaultSet): Registers {
  let chain = registers;
  for (const name of faults) {
    const next = chain;
    const rule = RULES[name]?.(next);
    if (rule === undefined) continue;
    chain = {
      read: (at, width) => {
        const value = next.read(at, width);
        return rule.read?.(at, value) ?? value;
      },
      write: (at, width, value) => {
        if (rule.write === undefined) next.write(at, width, value);
        else rule.write(at, width, value);
      },
    };
  }
  return chain;
}
