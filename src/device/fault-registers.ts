/** How the faults of `faults.ts` that concern the common configuration structure are made: rules around its registers. */
import { DeviceStatus, CommonCfgField as F } from '../virtio/pci-layout.ts';
import type { FaultName, FaultSet } from './faults.ts';

/** Access to the registers as they are. */
export interface Registers {
  read(at: number, width: number): number;
  write(at: number, width: number, value: number): void;
}

/** Changes what a register reads as. */
const READS: Partial<Record<FaultName, (at: number, value: number, registers: Registers) => number>> = {
  'queue-size-zero': (at, value) => (at === F.queueSize ? 0 : value),
  'queue-size-odd': (at, value) => (at === F.queueSize && value !== 0 ? 255 : value),
  'notify-outside-bar': (at, value) => (at === F.queueNotifyOff ? 0xffff : value),
  'reset-stuck': (at, value) => (at === F.deviceStatus ? value | DeviceStatus.ACKNOWLEDGE : value),
};

/** Does something else than writing `value` to a register. */
const WRITES: Partial<Record<FaultName, (at: number, width: number, value: number, registers: Registers) => void>> = {
  'address-halves': (at, width, value, registers) => {
    registers.write(at, width, value);
    if (at === F.queueDesc || at === F.queueDriver || at === F.queueDevice) registers.write(at + 4, 4, 0);
  },
};

/** `registers` with the faults. */
export function withRegisterFaults(registers: Registers, faults: FaultSet): Registers {
  let chain = registers;
  for (const name of faults) {
    const next = chain;
    const read = READS[name];
    const write = WRITES[name];
    if (read === undefined && write === undefined) continue;
    chain = {
      read: (at, width) => (read === undefined ? next.read(at, width) : read(at, next.read(at, width), next)),
      write: (at, width, value) => (write === undefined ? next.write(at, width, value) : write(at, width, value, next)),
    };
  }
  return chain;
}
