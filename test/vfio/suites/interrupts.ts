import { readdirSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { VfioError } from '../../../src/errors.ts';
import { EventFd } from '../../../src/sys/eventfd.ts';
import * as libc from '../../../src/sys/libc.ts';
import type { PciFunction } from '../../../src/vfio/function.ts';
import { Interrupts } from '../../../src/vfio/interrupts.ts';

const turn = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

/** A function that only has interrupts. */
function interruptible(vectors: number) {
  let listener: (reason: VfioError) => void = () => {};
  const sources: EventFd[] = [];
  const state = { gone: false, refuse: false, sets: [] as number[][] };
  const nothing = () => {
    throw new Error('not part of this test');
  };
  const region = {
    index: 0,
    size: 0,
    read8: nothing,
    read16: nothing,
    read32: nothing,
    write8: nothing,
    write16: nothing,
    write32: nothing,
  };
  const fn: PciFunction = {
    address: 'test',
    config: region,
    bar: () => region,
    iovaRanges: [],
    behindIommu: false,
    allocateDma: nothing,
    freeDma: nothing,
    interruptVectors: vectors,
    setInterrupts(eventfds) {
      if (state.refuse) throw new VfioError('DEVICE_REFUSED', 'no');
      state.sets.push([...eventfds]);
      for (const source of sources.splice(0)) source.close();
      for (const fd of eventfds) sources.push(EventFd.adopt(libc.fcntl(fd, libc.FcntlCommand.duplicate)));
    },
    reset: nothing,
    get gone() {
      return state.gone;
    },
    onGone(call) {
      listener = call;
    },
    close: nothing,
  };
  return {
    fn,
    state,
    fire: (vector: number) => sources[vector].signal(),
    lose() {
      state.gone = true;
      for (const source of sources.splice(0)) source.close();
      listener(new VfioError('DEVICE_GONE', 'it died'));
    },
    end: () => {
      for (const source of sources.splice(0)) source.close();
    },
  };
}

export function interruptsSuite(): void {
  describe('Interrupts', () => {
    let before: number;
    let device: ReturnType<typeof interruptible>;
    let interrupts: Interrupts;
    beforeEach(() => {
      before = readdirSync('/proc/self/fd').length;
      device = interruptible(4);
      interrupts = new Interrupts(device.fn, 3);
    });
    afterEach(() => {
      interrupts.close();
      device.end();
      expect(readdirSync('/proc/self/fd').length).toBe(before);
    });

    it('routes each vector to an eventfd of its own', () => {
      expect(interrupts.count).toBe(3);
      expect(device.state.sets).toEqual([[0, 1, 2].map((vector) => interrupts.eventfd(vector))]);
      expect(new Set(device.state.sets[0]).size).toBe(3);
    });

    it('wakes who waits for the vector that fires, and nobody else', async () => {
      const one = interrupts.wait(1, 2000);
      const two = interrupts.wait(2, 60);
      device.fire(1);
      expect(await one).toBe(true);
      expect(await two).toBe(false);
    });

    it('wakes all who wait for one vector', async () => {
      const all = [interrupts.wait(0), interrupts.wait(0), interrupts.wait(0, 2000)];
      device.fire(0);
      expect(await Promise.all(all)).toEqual([true, true, true]);
    });

    it('remembers one interrupt that fired while nobody waited, whether the event loop has seen it or not', async () => {
      device.fire(0);
      device.fire(0);
      expect(await interrupts.wait(0, 20)).toBe(true);
      expect(await interrupts.wait(0, 20)).toBe(false);
      device.fire(0);
      await turn(20);
      expect(await interrupts.wait(0, 20)).toBe(true);
      expect(await interrupts.wait(0, 20)).toBe(false);
    });

    it('loses no interrupt over many rounds', async () => {
      for (let i = 0; i < 200; i++) {
        const wait = interrupts.wait(i % 3, 2000);
        device.fire(i % 3);
        expect(await wait).toBe(true);
      }
    });

    it('calls listeners until they stop', async () => {
      let calls = 0;
      const stop = interrupts.listen(2, () => calls++);
      for (const expected of [1, 2]) {
        device.fire(2);
        await vi.waitFor(() => expect(calls).toBe(expected));
      }
      stop();
      device.fire(2);
      await turn(20);
      expect(calls).toBe(2);
    });

    it('rejects who waits when the function is lost, at once, and later waits too', async () => {
      const waits = [interrupts.wait(0), interrupts.wait(1, 60_000)];
      device.lose();
      for (const wait of waits) await expect(wait).rejects.toMatchObject({ code: 'DEVICE_GONE' });
      await expect(interrupts.wait(2)).rejects.toMatchObject({ code: 'DEVICE_GONE' });
      interrupts.close();
      expect(device.state.sets).toHaveLength(1);
    });

    it('disables interrupts when closed and rejects who waits', async () => {
      const wait = interrupts.wait(0);
      interrupts.close();
      interrupts.close();
      await expect(wait).rejects.toMatchObject({ code: 'INTERRUPTS_CLOSED' });
      await expect(interrupts.wait(0)).rejects.toMatchObject({ code: 'INTERRUPTS_CLOSED' });
      expect(() => interrupts.listen(0, () => {})).toThrow(VfioError);
      expect(device.state.sets.at(-1)).toEqual([]);
    });

    it('refuses vectors that do not exist', () => {
      for (const vector of [-1, 3, 0.5]) {
        expect(() => interrupts.wait(vector)).toThrow(RangeError);
        expect(() => interrupts.eventfd(vector)).toThrow(RangeError);
      }
      for (const count of [0, -1, 5, 1.5]) expect(() => new Interrupts(device.fn, count)).toThrow(RangeError);
    });

    it('closes its eventfds when the device refuses them', () => {
      device.state.refuse = true;
      const open = readdirSync('/proc/self/fd').length;
      expect(() => new Interrupts(device.fn, 2)).toThrow(expect.objectContaining({ code: 'DEVICE_REFUSED' }));
      expect(readdirSync('/proc/self/fd').length).toBe(open);
      device.state.refuse = false;
    });
  });
}
