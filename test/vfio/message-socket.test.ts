import { readdirSync } from 'node:fs';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import * as libc from '../../src/sys/libc.ts';
import { UnixSocket } from '../../src/sys/unix-socket.ts';
import { dropDescriptors, isReply, MessageSocket } from '../../src/vfio/message-socket.ts';
import * as protocol from '../../src/vfio/protocol.ts';

const soon = () => performance.now() + 1000;
const openDescriptors = () => readdirSync('/proc/self/fd').length;
const code = (expected: string) => expect.objectContaining({ name: 'VfioError', code: expected });

describe('MessageSocket', () => {
  let raw: UnixSocket;
  let messages: MessageSocket;
  let before: number;
  beforeEach(() => {
    before = openDescriptors();
    const [near, far] = UnixSocket.pair();
    raw = near;
    messages = new MessageSocket(far, 2, 4096);
  });
  afterEach(() => {
    raw.close();
    messages.close();
    messages.close();
    expect(openDescriptors()).toBe(before);
  });

  it('takes messages apart however the stream is cut', () => {
    fc.assert(
      fc.property(
        fc.array(fc.uint8Array({ maxLength: 60 }), { minLength: 1, maxLength: 5 }),
        fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 100 }),
        (payloads, cuts) => {
          const stream = Buffer.concat(payloads.map((payload, i) => protocol.reply(i, 9, payload)));
          const received: Uint8Array[] = [];
          for (let at = 0, i = 0; at < stream.length; i++) {
            const end = Math.min(at + cuts[i % cuts.length], stream.length);
            raw.send(stream.subarray(at, end), soon());
            at = end;
            for (let message = messages.tryReceive(); message !== null; message = messages.tryReceive()) {
              expect(message).toMatchObject({ id: received.length, command: 9, flags: 1, error: 0 });
              expect(isReply(message)).toBe(true);
              received.push(message.payload);
            }
          }
          expect(received).toEqual(payloads);
        },
      ),
      { numRuns: 50 },
    );
  });

  it('keeps descriptors with the message that they came with', () => {
    const fd = libc.memfdCreate('fd');
    raw.send(protocol.reply(1, 5), soon(), [fd, fd]);
    raw.send(protocol.reply(2, 5), soon());
    raw.send(protocol.reply(3, 5), soon(), [fd]);
    const counts = [1, 2, 3].map(() => {
      const message = messages.receive(soon());
      const count = message.descriptors.length;
      dropDescriptors(message);
      expect(message.descriptors).toEqual([]);
      return count;
    });
    expect(counts).toEqual([2, 0, 1]);
    libc.close(fd);
  });

  it('sends under the id it is given', () => {
    messages.send(protocol.encodeRegionRead(7, 0, 4), 0xbeef, soon());
    const bytes = new Uint8Array(32);
    raw.receive(bytes, 0, 32, soon());
    expect([...bytes.subarray(0, 4)]).toEqual([0xef, 0xbe, 9, 0]);
  });

  it.each([
    ['smaller than its header', 15],
    ['of no bytes', 0],
    ['larger than allowed', 4097],
    ['of 4 GiB', 0xffffffff],
  ])('refuses a message %s before it makes room for it', (_, size) => {
    const header = protocol.reply(1, 9);
    new DataView(header.buffer).setUint32(4, size, true);
    raw.send(header, soon());
    expect(() => messages.receive(soon())).toThrow(code('PROTOCOL'));
  });

  it('refuses more descriptors than announced, and closes them', () => {
    const fd = libc.memfdCreate('fd');
    raw.send(protocol.reply(1, 5), soon(), [fd, fd, fd]);
    expect(() => messages.receive(soon())).toThrow(code('PROTOCOL'));
    libc.close(fd);
  });

  it('closes the descriptors of a message that never arrives in full', () => {
    const fd = libc.memfdCreate('fd');
    raw.send(protocol.reply(1, 5, new Uint8Array(10)).subarray(0, 20), soon(), [fd]);
    expect(messages.tryReceive()).toBeNull();
    raw.close();
    expect(() => messages.tryReceive()).toThrow(code('PEER_CLOSED'));
    libc.close(fd);
  });

  it('closes them too when it is closed in the middle of one', () => {
    const fd = libc.memfdCreate('fd');
    raw.send(protocol.reply(1, 5).subarray(0, 8), soon(), [fd]);
    expect(messages.tryReceive()).toBeNull();
    messages.close();
    libc.close(fd);
  });

  it('gives up on half a message at the deadline', () => {
    raw.send(new Uint8Array(15), soon());
    const start = performance.now();
    expect(() => messages.receive(start + 30)).toThrow(code('TIMEOUT'));
    expect(performance.now() - start).toBeLessThan(500);
  });

  it('says when the other side is gone', () => {
    raw.close();
    expect(() => messages.receive(soon())).toThrow(code('PEER_CLOSED'));
    expect(() => messages.send(protocol.request(13, 0), 1, soon())).toThrow(code('PEER_CLOSED'));
  });

  it('gives up sending at the deadline when the other side does not read', () => {
    const large = protocol.request(10, 3_000_000);
    expect(() => messages.send(large, 1, performance.now() + 30)).toThrow(code('TIMEOUT'));
  });
});
