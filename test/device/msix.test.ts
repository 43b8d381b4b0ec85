import { afterEach, describe, expect, it } from 'vitest';
import { Msix, MsixEntry } from '../../src/device/msix.ts';
import { EventFd } from '../../src/sys/eventfd.ts';
import { close as closeFd, fcntl, memfdCreate } from '../../src/sys/libc.ts';

const DUPLICATE = 0;
const opened: { close(): void }[] = [];

function make(vectors = 4) {
  const msix = new Msix(vectors);
  const counters = Array.from({ length: vectors }, () => EventFd.create());
  opened.push(...counters, { close: () => msix.disconnectAll() });
  const connect = () => {
    for (let v = 0; v < vectors; v++) msix.connect(v, fcntl(counters[v].fd, DUPLICATE));
    msix.setControl(true, false);
  };
  return { msix, counters, connect };
}

afterEach(() => {
  for (const each of opened.splice(0)) each.close();
});

describe('MSI-X', () => {
  it('signals the eventfd of a vector', () => {
    const { msix, counters, connect } = make();
    connect();
    msix.fire(2);
    msix.fire(2);
    expect(counters.map((counter) => counter.drain())).toEqual([0, 0, 2, 0]);
  });

  it('sends nothing while it is disabled, nor for a vector that does not exist', () => {
    const { msix, counters, connect } = make();
    connect();
    msix.setControl(false, false);
    msix.fire(0);
    msix.setControl(true, false);
    msix.fire(4);
    msix.fire(0xffff);
    expect(counters.map((counter) => counter.drain())).toEqual([0, 0, 0, 0]);
  });

  it('keeps a masked vector pending and sends one message when it is unmasked', () => {
    const { msix, counters, connect } = make();
    connect();
    msix.writeTable(MsixEntry.size + MsixEntry.control, 1);
    msix.fire(1);
    msix.fire(1);
    expect(counters[1].drain()).toBe(0);
    expect(msix.readPending(0)).toBe(2);
    msix.writeTable(MsixEntry.size + MsixEntry.control, 0);
    expect(counters[1].drain()).toBe(1);
    expect(msix.readPending(0)).toBe(0);
  });

  it('keeps all vectors pending behind the function mask', () => {
    const { msix, counters, connect } = make();
    connect();
    msix.setControl(true, true);
    msix.fire(0);
    msix.fire(3);
    expect(msix.readPending(0)).toBe(9);
    msix.setControl(true, false);
    expect(counters.map((counter) => counter.drain())).toEqual([1, 0, 0, 1]);
  });

  it('keeps address and data of the table', () => {
    const { msix } = make();
    msix.writeTable(0, 0xfee00000);
    msix.writeTable(8, 0x4041);
    expect([msix.readTable(0), msix.readTable(8), msix.readTable(12)]).toEqual([0xfee00000, 0x4041, 1]);
  });

  it('refuses a descriptor that is no eventfd', () => {
    const { msix } = make();
    const fd = memfdCreate('x');
    expect(() => msix.connect(0, fd)).toThrow(expect.objectContaining({ code: 'EINVAL' }));
    closeFd(fd);
  });

  it('forgets what is pending at a reset, and goes on with the eventfds of its client', () => {
    const { msix, counters, connect } = make();
    connect();
    msix.setControl(true, true);
    msix.fire(0);
    msix.reset();
    expect(counters[0].drain()).toBe(0);
    msix.fire(0);
    expect(counters[0].drain()).toBe(1);
  });
});
