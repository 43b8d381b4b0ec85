/**
 * One handing over of a queue pair to another thread, from the offer to the end: what is open for it, and the commands that are under way.
 */
import { randomInt } from 'node:crypto';
import { MessageChannel, type MessagePort } from 'node:worker_threads';
import type { EventFd } from '../sys/eventfd.ts';
import type { Watch } from '../sys/ffi/ffi.ts';
import { close, FcntlCommand, fcntl } from '../sys/libc.ts';
import { MappingLedger } from '../sys/mapping-ledger.ts';
import { ControlBlock } from './control-block.ts';
import type { Answer } from './messages.ts';

export interface Pending {
  readonly resolve: (answer: Answer) => void;
  readonly reject: (error: Error) => void;
  readonly timer: NodeJS.Timeout;
}

/** One handing over, from `transfer` to the end. */
export interface Tenancy {
  readonly control: ControlBlock;
  readonly port: MessagePort;
  /** Closed when the queue has come back. */
  readonly descriptors: number[];
  readonly relays: { readonly eventfd: EventFd; readonly watch: Watch }[];
  readonly pending: Map<number, Pending>;
  /** What the thread has mapped. */
  readonly ledger: MappingLedger;
}

/** A new one, and the port for the other side. */
export function makeTenancy(): { readonly tenancy: Tenancy; readonly theirs: MessagePort } {
  const control = new ControlBlock();
  control.tenancy = randomInt(2 ** 31);
  const { port1: port, port2: theirs } = new MessageChannel();
  const tenancy = { control, port, descriptors: [], relays: [], pending: new Map(), ledger: new MappingLedger() };
  return { tenancy, theirs };
}

/** A descriptor of the same file that lives until the queue has come back. */
export function duplicate(tenancy: Tenancy, fd: number): number {
  const own = fcntl(fd, FcntlCommand.duplicate, 0);
  tenancy.descriptors.push(own);
  return own;
}

/** Takes a command off those that are under way. */
export function settle(tenancy: Tenancy, id: number): Pending | undefined {
  const pending = tenancy.pending.get(id);
  tenancy.pending.delete(id);
  if (pending !== undefined) clearTimeout(pending.timer);
  return pending;
}

/** Closes what was open for it. */
export function endTenancy({ descriptors, relays, port }: Tenancy): void {
  port.close();
  for (const { eventfd, watch } of relays.splice(0)) {
    watch.close();
    eventfd.close();
  }
  for (const fd of descriptors.splice(0)) close(fd);
}
