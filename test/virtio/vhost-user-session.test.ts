import { afterEach, describe, expect, it } from 'vitest';
import { openVhostUser, type VhostUserDevice, type VhostUserOptions } from '../../src/virtio/vhost-user.ts';
import { ProtocolFeature, Request } from '../../src/virtio/vhost-user-protocol.ts';
import {
  cleanUp,
  deadlineFor,
  descriptors,
  type FakeBackEnd,
  type FakeDevice,
  type Rule,
  startBackEnd,
} from './vhost-user/fake.ts';

const devices: VhostUserDevice[] = [];

afterEach(async () => {
  for (const device of devices.splice(0)) device.close();
  await cleanUp();
});

async function open(
  rules: readonly Rule[] = [],
  device: FakeDevice = {},
  options: VhostUserOptions = { timeoutMs: deadlineFor(rules) },
): Promise<{ device: VhostUserDevice; backEnd: FakeBackEnd }> {
  const backEnd = await startBackEnd({ rules, device });
  const opened = await openVhostUser(backEnd.path, options);
  devices.push(opened);
  return { device: opened, backEnd };
}

/** Wrong answers to a request that has one, and how the session ends. */
const WRONG: readonly (readonly [name: string, rule: Omit<Rule, 'request'>, code: string])[] = [
  ['a reply to another request', { reply: { request: 2 } }, 'PROTOCOL'],
  ['a reply that is not marked as one', { reply: { flags: 1 } }, 'PROTOCOL'],
  ['a reply of another version', { reply: { flags: 6 } }, 'PROTOCOL'],
  ['a reply with flags that nobody knows', { reply: { flags: 0x15 } }, 'PROTOCOL'],
  ['a reply that is too long', { reply: { payload: Array(9).fill(0) } }, 'PROTOCOL'],
  ['a reply that is too short', { reply: { payload: Array(7).fill(0) } }, 'PROTOCOL'],
  ['a reply that claims to be gigantic', { reply: { size: 0xffffffff } }, 'PROTOCOL'],
  ['a reply with a descriptor', { descriptors: true }, 'PROTOCOL'],
  ['half a header and the end', { partial: 4, cut: true }, 'DEVICE_GONE'],
  ['a header and the end', { partial: 12, cut: true }, 'DEVICE_GONE'],
  ['the end', { close: true }, 'DEVICE_GONE'],
  ['nothing', { stall: true }, 'TIMEOUT'],
  ['part of a reply', { partial: 13 }, 'TIMEOUT'],
];

describe('a session with a vhost-user back-end', () => {
  it.each(WRONG)('ends when the answer to a request is %s', async (_, rule, code) => {
    const { device } = await open([{ request: Request.GET_STATUS, ...rule }]);
    const reasons: string[] = [];
    device.onGone((error) => reasons.push(error.code));
    expect(() => device.readStatus()).toThrow(expect.objectContaining({ code }));
    expect(device.gone).toBe(true);
    expect(reasons).toEqual([code]);
    // Later calls say that it is gone, and why.
    expect(() => device.readStatus()).toThrow(
      expect.objectContaining({ code: 'DEVICE_GONE', cause: expect.objectContaining({ code }) }),
    );
    device.onGone((error) => reasons.push(error.code));
    expect(reasons).toEqual([code, code]);
  });

  it.each(WRONG)('ends when the acknowledgement of a request is %s', async (_, rule, code) => {
    const { device } = await open([{ request: Request.SET_STATUS, ...rule }]);
    expect(() => device.writeStatus(1)).toThrow(expect.objectContaining({ code }));
    expect(device.gone).toBe(true);
  });

  it('goes on after a request that was refused', async () => {
    const { device } = await open([{ request: Request.SET_STATUS, nth: 1, refuse: true }]);
    expect(() => device.writeStatus(1)).toThrow(expect.objectContaining({ code: 'DEVICE_REFUSED' }));
    expect(device.gone).toBe(false);
    device.writeStatus(3);
    expect(device.readStatus()).toBe(3);
  });

  it('puts a reply together that comes byte by byte, and takes one that still asks for a reply', async () => {
    const { device } = await open([
      { request: Request.GET_STATUS, nth: 1, dribble: true },
      { request: Request.GET_STATUS, nth: 2, reply: { flags: 0xd } },
    ]);
    device.writeStatus(3);
    expect(device.readStatus()).toBe(3);
    expect(device.readStatus()).toBe(3);
  });

  it('ends when something comes that nobody asked for', async () => {
    const { device } = await open([{ request: Request.GET_STATUS, unasked: [1, 2, 3] }]);
    const gone = new Promise<Error>((resolve) => device.onGone(resolve));
    device.readStatus();
    expect(await gone).toMatchObject({ code: 'PROTOCOL' });
  });

  it('ends by itself when the back-end goes', async () => {
    const { device, backEnd } = await open();
    const gone = new Promise<Error>((resolve) => device.onGone(resolve));
    await backEnd.kill();
    expect(await gone).toMatchObject({ code: 'DEVICE_GONE' });
    expect(() => device.allocateDma(4096)).toThrow(expect.objectContaining({ code: 'DEVICE_GONE' }));
    expect(() => device.writeStatus(0)).toThrow(expect.objectContaining({ code: 'DEVICE_GONE' }));
  });

  it('says that it is closed, not lost, after close', async () => {
    const { device } = await open();
    device.close();
    device.close();
    expect(device.gone).toBe(false);
    expect(() => device.readStatus()).toThrow(expect.objectContaining({ code: 'DEVICE_GONE' }));
  });

  it('reads a status of one byte and no more', async () => {
    const { device } = await open([{ request: Request.GET_STATUS, reply: { payload: [0, 1, 0, 0, 0, 0, 0, 0] } }]);
    expect(() => device.readStatus()).toThrow(expect.objectContaining({ code: 'PROTOCOL' }));
  });
});

describe('opening a vhost-user port', () => {
  const ALL = [ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIGURE_MEM_SLOTS];
  const first = [
    ['GET_FEATURES', Request.GET_FEATURES, 'NOT_VHOST_USER'],
    ['GET_PROTOCOL_FEATURES', Request.GET_PROTOCOL_FEATURES, null],
    ['GET_QUEUE_NUM', Request.GET_QUEUE_NUM, null],
    ['GET_MAX_MEM_SLOTS', Request.GET_MAX_MEM_SLOTS, null],
  ] as const;
  for (const [name, request, code] of first) {
    it.each(WRONG)(`fails and leaves nothing open when the answer to ${name} is %s`, async (_, rule, own) => {
      const before = descriptors();
      const rules = [{ request, ...rule }];
      const backEnd = await startBackEnd({ rules, device: { protocol: ALL } });
      await expect(openVhostUser(backEnd.path, { timeoutMs: deadlineFor(rules) })).rejects.toMatchObject({
        code: code ?? own,
      });
      // The back-end is a thread of this process.
      await cleanUp();
      expect(descriptors()).toBeLessThanOrEqual(before);
    });
  }

  it.each([
    ['no queues', Request.GET_QUEUE_NUM],
    ['no memory slots', Request.GET_MAX_MEM_SLOTS],
  ])('refuses a back-end that claims to have %s', async (_, request) => {
    const rules = [{ request, reply: { payload: Array(8).fill(0) } }];
    await expect(open(rules, { protocol: ALL })).rejects.toMatchObject({ code: 'PROTOCOL' });
  });

  it('agrees on the protocol features that both know, and asks for nothing that was not agreed on', async () => {
    const { backEnd } = await open([], { protocol: [ProtocolFeature.MQ, ProtocolFeature.LOG_SHMFD, 40] });
    await backEnd.settled();
    const names = backEnd.messages.map(({ request }) => request);
    expect(names).toEqual([
      Request.SET_OWNER,
      Request.GET_FEATURES,
      Request.GET_PROTOCOL_FEATURES,
      Request.SET_PROTOCOL_FEATURES,
      Request.GET_QUEUE_NUM,
    ]);
    expect(backEnd.messages[3].payload).toEqual(Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0));
    expect(backEnd.violations).toEqual([]);
  });

  it('asks nothing of the sort of a back-end that knows no protocol features', async () => {
    const { device, backEnd } = await open([], { protocol: [] });
    await backEnd.settled();
    expect(backEnd.messages.map(({ request }) => request)).toEqual([Request.SET_OWNER, Request.GET_FEATURES]);
    expect(device.backEnd.queuePairs).toBe(1);
  });

  it('says when nobody listens, or somebody else does', async () => {
    await expect(openVhostUser('/nonexistent/port.sock')).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
    const rude = startBackEnd({ device: { greeting: Array(64).fill(0x41) } });
    await expect(openVhostUser((await rude).path)).rejects.toMatchObject({ code: 'NOT_VHOST_USER' });
  });

  it('refuses deadlines that are none', async () => {
    await expect(openVhostUser('/x', { timeoutMs: 0 })).rejects.toThrow(RangeError);
    await expect(openVhostUser('/x', { connectTimeoutMs: Number.NaN })).rejects.toThrow(RangeError);
  });

  it('waits for the back-end to connect, and takes the path away again', async () => {
    const backEnd = await startBackEnd({ connect: true });
    const device = await openVhostUser(backEnd.path, { server: true });
    devices.push(device);
    expect(device.readStatus()).toBe(0);
    await expect(openVhostUser(backEnd.path)).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
  });

  it('does not wait for ever', async () => {
    const before = descriptors();
    const { path } = await startBackEnd();
    const own = `${path}.server`;
    const opening = openVhostUser(own, { server: true, connectTimeoutMs: 50 });
    await expect(opening).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
    const taken = openVhostUser(path, { server: true, connectTimeoutMs: 50 });
    await expect(taken).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
    await cleanUp();
    expect(descriptors()).toBeLessThanOrEqual(before);
  });
});
