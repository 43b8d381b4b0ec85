import { describe, expect, it } from 'vitest';
import { ATTENTION, ControlBlock, Owner, Wish } from '../../src/worker/control-block.ts';
import { makeTicket, takeTicket } from '../../src/worker/messages.ts';

/** The same block as each of two threads has it. */
function both(): [control: ControlBlock, worker: ControlBlock] {
  const control = new ControlBlock();
  return [control, new ControlBlock(control.buffer)];
}

describe('the block that the threads of a queue share', () => {
  it('has one owner, whoever is faster', () => {
    const [control, worker] = both();
    expect(control.owner).toBe(Owner.offered);
    expect(worker.pass(Owner.offered, Owner.worker)).toBe(true);
    expect(control.pass(Owner.offered, Owner.none)).toBe(false);
    expect(control.owner).toBe(Owner.worker);
  });

  it('calls attention with every wish, and tells the first reason', () => {
    const [control, worker] = both();
    expect(worker.reason).toBeNull();
    const seen = worker.words[ATTENTION];
    control.ask(Wish.stop, { code: 'DEVICE_GONE', message: 'the device is gone, für immer' });
    expect(worker.words[ATTENTION]).not.toBe(seen);
    control.ask(Wish.close, { code: 'NIC_CLOSED', message: 'closed' });
    expect(worker.wish).toBe(Wish.close);
    expect(worker.reason).toEqual({ code: 'DEVICE_GONE', message: 'the device is gone, für immer' });
    control.ask(Wish.stop, { code: 'LATE', message: '' });
    expect(worker.wish).toBe(Wish.close);
  });

  it('cuts a reason that is too long', () => {
    const [control, worker] = both();
    control.ask(Wish.stop, { code: 'LONG', message: 'x'.repeat(5000) });
    expect(worker.reason?.code).toBe('LONG');
    expect(worker.reason?.message).toMatch(/^x{500,1000}$/);
  });

  it('keeps counters, positions and words apart', () => {
    const [control, worker] = both();
    const { rx, tx } = worker.counters;
    const arrays = [rx.counters, rx.dropped, tx.counters, tx.dropped];
    for (const [i, array] of arrays.entries()) array.fill(i + 1);
    worker.position('rx').next = 0x8001;
    worker.position('tx').next = 7;
    expect([control.position('rx').next, control.position('tx').next]).toEqual([0x8001, 7]);
    expect(control.owner).toBe(Owner.offered);
    expect(control.reason).toBeNull();
    const seen = control.counters;
    for (const [i, array] of [seen.rx.counters, seen.rx.dropped, seen.tx.counters, seen.tx.dropped].entries()) {
      expect([...array]).toEqual(Array(array.length).fill(i + 1));
    }
  });

  it('lets a command be taken once, by its sender or by its receiver', () => {
    const ticket = makeTicket();
    expect([takeTicket(ticket), takeTicket(ticket)]).toEqual([true, false]);
  });
});
