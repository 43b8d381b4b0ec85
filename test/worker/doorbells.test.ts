import { afterEach, describe, expect, it } from 'vitest';
import { EventFd } from '../../src/sys/eventfd.ts';
import { close, ftruncate, memfdCreate } from '../../src/sys/libc.ts';
import { type MappedMemory, mapAnonymous, mapShared, unmapMemory } from '../../src/sys/memory.ts';
import { SplitVirtqueue } from '../../src/virtqueue/split.ts';
import { ControlBlock } from '../../src/worker/control-block.ts';
import { openDoorbell } from '../../src/worker/doorbells.ts';

const PAGE = 4096;
/** The page of the registers in their file, and the register in it. */
const [OFFSET, AT] = [PAGE, 0x104];

const ends: (() => void)[] = [];
afterEach(() => {
  for (const end of ends.splice(0).reverse()) end();
});

function held(memory: MappedMemory): MappedMemory {
  ends.push(() => unmapMemory(memory));
  return memory;
}

function setup() {
  const fd = memfdCreate('registers');
  ends.push(() => close(fd));
  ftruncate(fd, 3 * PAGE);
  const registers = held(mapShared(fd, 0, 3 * PAGE, { write: true }));
  const memory = { ...held(mapAnonymous(PAGE)), iova: 0x10000, iovaLow: 0x10000, iovaHigh: 0 };
  const queue = new SplitVirtqueue(memory, { index: 5, size: 8 });
  const eventfd = EventFd.create();
  ends.push(() => eventfd.close());
  return { fd, registers, queue, eventfd, control: new ControlBlock() };
}

/** Makes `n` buffers available. */
function post(queue: SplitVirtqueue, n: number): void {
  const tokens = Uint32Array.from({ length: n }, (_, i) => i);
  const places = new Uint32Array(n);
  queue.postBurst(tokens, 0, n, places, new Uint32Array(n).fill(64), true);
  queue.publish();
}

describe('the doorbell of a worker thread', () => {
  it.each([
    { withPosition: false, width: 2, expected: 0x4005 },
    { withPosition: true, width: 4, expected: 0x0003_4005 },
  ])(
    'is the register itself when it can be mapped; with position: $withPosition',
    ({ withPosition, width, expected }) => {
      const { fd, registers, queue, control } = setup();
      registers.u32.fill(0xffffffff, PAGE / 4, (2 * PAGE) / 4);
      const register = { kind: 'memory', fd, offset: OFFSET, at: AT } as const;
      const { notifier, memory } = openDoorbell({ register, id: 0x4005, withPosition }, queue, control, 'rx');
      post(queue, 3);
      notifier.notify();
      const at = OFFSET + AT;
      expect(width === 2 ? registers.u16[at / 2] : registers.u32[at / 4]).toBe(expected);
      // Nothing beside it.
      const others = registers.u8.filter((_, i) => i < at || i >= at + width);
      expect(others.subarray(0, OFFSET).every((byte) => byte === 0)).toBe(true);
      expect(others.subarray(OFFSET, 2 * PAGE - width).every((byte) => byte === 0xff)).toBe(true);
      expect(memory).not.toBeNull();
      if (memory !== null) unmapMemory(memory);
      // A late one goes nowhere.
      registers.u32.fill(0);
      notifier.notify();
      expect(registers.u32.every((word) => word === 0)).toBe(true);
    },
  );

  it('is an eventfd that stands for the register', () => {
    const { queue, eventfd, control } = setup();
    const register = { kind: 'eventfd', fd: eventfd.fd } as const;
    const { notifier, memory } = openDoorbell({ register, id: 5, withPosition: false }, queue, control, 'tx');
    notifier.notify();
    notifier.notify();
    expect(eventfd.drain()).toBe(2);
    expect(memory).toBeNull();
  });

  it('goes through the control thread, with where the ring stands', () => {
    const { queue, eventfd, control } = setup();
    const { notifier } = openDoorbell({ relay: eventfd.fd }, queue, control, 'tx');
    post(queue, 4);
    notifier.notify();
    expect(eventfd.drain()).toBe(1);
    const theirs = new ControlBlock(control.buffer);
    expect([theirs.position('tx').next, theirs.position('rx').next]).toEqual([4, 0]);
  });

  it('is not opened with a descriptor that is no eventfd', () => {
    const { fd, queue, control } = setup();
    expect(() => openDoorbell({ relay: fd }, queue, control, 'rx')).toThrow(
      expect.objectContaining({ code: 'EINVAL' }),
    );
  });
});
