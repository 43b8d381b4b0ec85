import { describe, expect, it } from 'vitest';
import { type DmaMemory, mapAnonymous } from '../../src/sys/memory.ts';
import { NO_VECTOR } from '../../src/virtio/pci-layout.ts';
import { ControlDevice } from '../../src/virtio/vhost-user-control.ts';
import { createVirtqueue, type RingFormat, virtqueueBytes } from '../../src/virtqueue/create.ts';

const IOVA = 0x3_0000_0000;
const MEMORY = 65536;
/** Where commands and acknowledgements are in the memory. */
const COMMAND = 0x8000;
const ACK = 0x9000;

function control(format: RingFormat, eventIdx: boolean, size = 4) {
  const mapped = mapAnonymous(MEMORY);
  const memory: DmaMemory = { ...mapped, iova: IOVA, iovaLow: 0, iovaHigh: 3 };
  const options = { index: 8, size, eventIdx };
  expect(virtqueueBytes(format, options)).toBeLessThan(COMMAND);
  const queue = createVirtqueue(format, memory, options);
  const asked: number[] = [];
  let interrupts = 0;
  const find = (iova: number, count: number): { memory: DmaMemory; offset: number } | null =>
    iova >= IOVA && iova + count <= IOVA + MEMORY ? { memory, offset: iova - IOVA } : null;
  const { descriptorArea, driverArea, deviceArea } = queue;
  const setup = { size, descriptorArea, driverArea, deviceArea, vector: NO_VECTOR };
  const device = new ControlDevice(setup, {
    find,
    eventIdx,
    packed: format === 'packed',
    setQueuePairs: (pairs) => asked.push(pairs) > 0 && pairs <= 3,
    interrupt: () => interrupts++,
  });
  /** Sends a command in pieces of the given lengths; returns the acknowledgement, or -1 when nothing was written. */
  const command = (bytes: readonly number[], pieces: readonly number[] = [bytes.length], ack = 1): number => {
    memory.u8.set(bytes, COMMAND);
    memory.u8[ACK] = 0xff;
    const list: number[] = [];
    let at = COMMAND;
    for (const length of pieces) {
      list.push(at, 3, length);
      at += length;
    }
    if (ack > 0) list.push(ACK, 3, ack);
    expect(queue.postChain(7, Uint32Array.from(list), pieces.length, ack > 0 ? 1 : 0)).toBe(true);
    expect(queue.publish()).toBe(true);
    device.notify();
    const [tokens, written] = [new Uint32Array(4), new Uint32Array(4)];
    expect(queue.take(tokens, written, 4)).toBe(1);
    expect(tokens[0]).toBe(7);
    return written[0] === 0 ? -1 : memory.u8[ACK];
  };
  return { command, asked, memory, queue, device, interrupts: () => interrupts };
}

const OK = 0;
const ERR = 1;

describe.each([
  ['split', false],
  ['split', true],
  ['packed', false],
  ['packed', true],
] as const)('the control queue of a vhost-user port, %s, event indices %s', (format, eventIdx) => {
  it('sets the number of queue pairs, time after time', () => {
    const { command, asked, interrupts } = control(format, eventIdx);
    for (let i = 0; i < 40; i++) expect(command([4, 0, 1 + (i % 3), 0])).toBe(OK);
    expect(asked).toHaveLength(40);
    expect(interrupts()).toBe(40);
  });

  it('says no when there are not so many', () => {
    const { command, asked } = control(format, eventIdx);
    expect(command([4, 0, 4, 0])).toBe(ERR);
    expect(command([4, 0, 1, 1])).toBe(ERR);
    expect(asked).toEqual([4, 257]);
  });

  it.each([
    ['another class', [0, 0, 1]],
    ['another command', [4, 1, 1, 0]],
    ['a short command', [4, 0, 1]],
    ['a long command', [4, 0, 1, 0, 0]],
    ['no command', []],
  ])('says no to %s, and goes on', (_, bytes) => {
    const { command, asked } = control(format, eventIdx);
    expect(command(bytes)).toBe(ERR);
    expect(asked).toEqual([]);
    expect(command([4, 0, 2, 0])).toBe(OK);
  });

  it('takes a command in pieces, and one that wants no answer', () => {
    const { command, asked } = control(format, eventIdx);
    expect(command([4, 0, 3, 0], [2, 1, 1])).toBe(OK);
    expect(command([4, 0, 2, 0], [1, 3], 0)).toBe(-1);
    expect(asked).toEqual([3, 2]);
  });

  it('finds nothing outside of the memory of the device', () => {
    const { memory, queue, device } = control(format, eventIdx);
    queue.postChain(1, Uint32Array.of(COMMAND, 4, 4, ACK, 3, 1), 1, 1);
    queue.publish();
    expect(() => device.notify()).toThrow(expect.objectContaining({ code: 'QUEUE_ADDRESS' }));
    const setup = { size: 4, descriptorArea: IOVA + MEMORY, driverArea: IOVA, deviceArea: IOVA, vector: NO_VECTOR };
    const options = { find: () => null, eventIdx, packed: false, setQueuePairs: () => true, interrupt: () => {} };
    expect(() => new ControlDevice(setup, options)).toThrow(expect.objectContaining({ code: 'QUEUE_ADDRESS' }));
    expect(memory.size).toBe(MEMORY);
  });
});
