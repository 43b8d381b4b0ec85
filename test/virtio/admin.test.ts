import { afterEach, describe, expect, it } from 'vitest';
import { AdminCommandError, VfioError, VirtioError } from '../../src/errors.ts';
import { AdminQueue, type AdminQueueOptions } from '../../src/virtio/admin.ts';
import { AdminOpcode, AdminQualifier, AdminStatus, encodeIdList, ResourceType } from '../../src/virtio/admin-wire.ts';
import { Feature, FeatureSet } from '../../src/virtio/features.ts';
import { DeviceStatus } from '../../src/virtio/pci-layout.ts';
import type { NaiveSplitDevice } from '../virtqueue/support.ts';
import { FakeDevice, type ReceivedCommand, receiveCommands } from './fake-device.ts';

const SA = ResourceType.NET_IPSEC_INB_SA;
const opened: AdminQueue[] = [];
afterEach(() => {
  for (const queue of opened.splice(0)) queue.close();
});

/** A device whose commands the test answers by hand, or, with `serve`, as they come. */
function open(options: AdminQueueOptions = {}, features = FeatureSet.of(Feature.VERSION_1, Feature.INDIRECT_DESC)) {
  const device = new FakeDevice();
  device.accepted = features;
  const admin = new AdminQueue(device, device, features, { timeout: 500, ...options });
  opened.push(admin);
  device.status = DeviceStatus.DRIVER_OK;
  const queue = device.queues.get(2) as NaiveSplitDevice;
  const seen: ReceivedCommand[] = [];
  const receive = () => {
    const commands = receiveCommands(device, queue);
    seen.push(...commands);
    return commands;
  };
  const serve = (handler: (command: ReceivedCommand) => void) => {
    device.onNotify = () => {
      setImmediate(() => {
        for (const command of receive()) handler(command);
      });
    };
  };
  return { device, admin, queue, receive, serve, seen };
}

function failure(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(
    () => undefined,
    (error: unknown) => error,
  );
}

const later = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

describe('administration commands', () => {
  it.each([
    { name: 'with indirect descriptors', features: [Feature.INDIRECT_DESC] },
    { name: 'with chained descriptors', features: [] },
    { name: 'with event indices', features: [Feature.INDIRECT_DESC, Feature.EVENT_IDX] },
  ])('come back with their results $name', async ({ features }) => {
    const { admin, serve, seen } = open({}, FeatureSet.of(Feature.VERSION_1, ...features));
    serve((command) => {
      const { opcode } = command;
      if (opcode === AdminOpcode.LIST_QUERY) command.reply(0, 0, encodeIdList([0, 1, 7, 64]));
      else if (opcode === AdminOpcode.CAP_ID_LIST_QUERY) command.reply(0, 0, encodeIdList([0x800, 0x804]));
      else if (opcode === AdminOpcode.DEVICE_CAP_GET) command.reply(0, 0, Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8));
      else command.reply(0);
    });
    expect(await admin.listQuery()).toEqual([0, 1, 7, 64]);
    await admin.listUse([0, 1, 7]);
    expect(await admin.capabilityIds()).toEqual([0x800, 0x804]);
    expect([...(await admin.deviceCapability(0x803))]).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
    await admin.setDriverCapability(0x803, Uint8Array.of(9, 9, 9));
    expect(seen.map(({ opcode }) => opcode)).toEqual([0, 1, 7, 8, 9]);
    expect([...seen[1].data]).toEqual([...encodeIdList([0, 1, 7])]);
    expect([...seen[4].data.subarray(0, 11)]).toEqual([3, 8, 0, 0, 0, 0, 0, 0, 9, 9, 9]);
  });

  it('have both parts padded to a multiple of 8', async () => {
    const { admin, serve, seen } = open();
    serve((command) => command.reply(0));
    await admin.createObject(SA, 1, new Uint8Array(196));
    await admin.queryObject(SA, 1, 13);
    expect(seen.map(({ readable, writable }) => [readable, writable])).toEqual([
      [240, 8],
      [40, 24],
    ]);
  });

  it('are several at a time on the queue, and are answered in any order', async () => {
    const { admin, receive } = open();
    const all = Promise.all([1, 2, 3, 4].map((id) => admin.queryObject(SA, id, 8)));
    const commands = receive();
    expect(commands).toHaveLength(4);
    for (const command of commands.reverse()) command.reply(0, 0, Uint8Array.of(command.data[4]));
    expect((await all).map((bytes) => bytes[0])).toEqual([1, 2, 3, 4]);
  });

  it('wait for a slot when all are in use, and keep their order', async () => {
    const { admin, serve, seen } = open({ slots: 2 });
    serve((command) => command.reply(0));
    await Promise.all(Array.from({ length: 50 }, (_, id) => admin.destroyObject(SA, id)));
    expect(seen.map(({ data }) => data[4])).toEqual(Array.from({ length: 50 }, (_, id) => id));
    expect(admin.pending).toBe(0);
  });

  it('that are LIST_USE are alone on the queue', async () => {
    const { admin, receive } = open();
    const before = admin.destroyObject(SA, 1);
    const use = admin.listUse([0, 1]);
    const after = admin.destroyObject(SA, 2);
    const [first] = receive();
    expect(first.opcode).toBe(AdminOpcode.RESOURCE_OBJ_DESTROY);
    first.reply(0);
    await before;
    const second = receive();
    expect(second.map(({ opcode }) => opcode)).toEqual([AdminOpcode.LIST_USE]);
    second[0].reply(0);
    await use;
    const third = receive();
    expect(third.map(({ opcode }) => opcode)).toEqual([AdminOpcode.RESOURCE_OBJ_DESTROY]);
    third[0].reply(0);
    await after;
  });

  it.each([
    { status: AdminStatus.ENXIO, qualifier: 0, code: 'ADMIN_ENXIO' },
    { status: AdminStatus.EEXIST, qualifier: 0, code: 'ADMIN_EEXIST' },
    { status: AdminStatus.EINVAL, qualifier: AdminQualifier.INVALID_FIELD, code: 'ADMIN_EINVAL' },
    { status: AdminStatus.ENOSPC, qualifier: 0, code: 'ADMIN_ENOSPC' },
    { status: 77, qualifier: 99, code: 'ADMIN_EINVAL' },
  ])('fail with $code when the device says $status', async ({ status, qualifier, code }) => {
    const { admin, serve } = open();
    serve((command) => command.reply(status, qualifier));
    const error = await failure(admin.createObject(SA, 3, Uint8Array.of(1)));
    expect(error).toBeInstanceOf(AdminCommandError);
    expect(error).toMatchObject({ code, status, qualifier, opcode: AdminOpcode.RESOURCE_OBJ_CREATE });
    expect(String(error)).toContain('RESOURCE_OBJ_CREATE of NET_IPSEC_INB_SA 3');
  });

  it('that do not fit a slot are refused without being sent', async () => {
    const { admin, receive } = open({ commandBytes: 64, replyBytes: 64 });
    expect(await failure(admin.createObject(SA, 0, new Uint8Array(25)))).toMatchObject({ code: 'ADMIN_TOO_LONG' });
    expect(await failure(admin.queryObject(SA, 0, 57))).toMatchObject({ code: 'ADMIN_TOO_LONG' });
    expect(receive()).toHaveLength(0);
  });

  it('leave no key in shared memory, nor in the array of the caller’s command, once they are answered', async () => {
    const { device, admin, receive } = open();
    const key = Uint8Array.from({ length: 32 }, (_, i) => 0xa0 + i);
    const created = admin.createObject(SA, 1, key);
    const queried = admin.queryObject(SA, 1, 32);
    const [create, query] = receive();
    expect([...create.shared.subarray(40, 72)]).toEqual([...key]);
    create.reply(0);
    query.reply(0, 0, key);
    await created;
    expect([...(await queried)]).toEqual([...key]);
    for (const { u8 } of device.memory.blocks) expect(findBytes(u8, key.subarray(0, 8))).toBe(-1);
  });
});

describe('replies of administration commands', () => {
  it('that are shorter than the result give what is there', async () => {
    const { admin, receive } = open();
    const result = admin.queryObject(SA, 1, 32);
    receive()[0].answer(Uint8Array.of(0, 0, 0, 0, 0, 0, 0, 0, 5, 6, 7));
    expect([...(await result)]).toEqual([5, 6, 7]);
  });

  it('whose used length hides bytes that the device wrote hide them', async () => {
    const { admin, receive } = open();
    const result = admin.queryObject(SA, 1, 32);
    receive()[0].answer(new Uint8Array(40).fill(0), 10);
    expect([...(await result)]).toEqual([0, 0]);
  });

  it('that are longer than expected are cut', async () => {
    const { admin, receive } = open();
    const result = admin.queryObject(SA, 1, 3);
    receive()[0].answer(Uint8Array.from({ length: 16 }, (_, i) => (i < 8 ? 0 : i)));
    expect([...(await result)]).toEqual([8, 9, 10]);
  });

  it('without a qualifier have a qualifier of 0', async () => {
    const { admin, receive } = open();
    const error = failure(admin.destroyObject(SA, 1));
    receive()[0].answer(Uint8Array.of(22, 0, 3, 0), 2);
    expect(await error).toMatchObject({ status: 22, qualifier: 0 });
  });

  it.each([0, 1])('of %s bytes are no success', async (length) => {
    const { admin, receive } = open();
    const error = failure(admin.destroyObject(SA, 1));
    receive()[0].answer(new Uint8Array(8), length);
    expect(await error).toMatchObject({ code: 'ADMIN_REPLY' });
  });

  it('with a used length beyond the buffer close the queue and reject everything', async () => {
    const { admin, receive } = open();
    const errors = [1, 2].map((id) => failure(admin.destroyObject(SA, id)));
    receive()[0].answer(new Uint8Array(8), 9);
    for (const error of errors) expect(await error).toMatchObject({ code: 'USED_LENGTH' });
    expect(await failure(admin.listQuery())).toMatchObject({ code: 'USED_LENGTH' });
  });

  it('for a command that was never given close the queue', async () => {
    const { admin, queue } = open();
    const error = failure(admin.destroyObject(SA, 1));
    queue.complete(9, 8);
    expect(await error).toMatchObject({ code: 'USED_ID' });
  });
});

describe('deadlines of administration commands', () => {
  it('reject a command that the device does not answer', async () => {
    const { admin } = open({ timeout: 30 });
    const error = await failure(admin.destroyObject(SA, 1));
    expect(error).toBeInstanceOf(VirtioError);
    expect(error).toMatchObject({ code: 'ADMIN_TIMEOUT' });
  });

  it('keep the slot of a late command out of use, so that its answer hits no other', async () => {
    const { admin, receive } = open({ timeout: 250, slots: 2 });
    const lost = failure(admin.queryObject(SA, 1, 8));
    const [late] = receive();
    expect(await lost).toMatchObject({ code: 'ADMIN_TIMEOUT' });
    const before = late.shared.slice();
    const next = admin.queryObject(SA, 2, 8);
    const [second] = receive();
    expect(second.shared.byteOffset).not.toBe(late.shared.byteOffset);
    expect([...late.shared], 'the device may still be reading it').toEqual([...before]);
    late.reply(0, 0, Uint8Array.of(66));
    await later(20);
    second.reply(0, 0, Uint8Array.of(77));
    expect((await next)[0]).toBe(77);
    expect(
      late.shared.every((byte) => byte === 0),
      'wiped once it came back',
    ).toBe(true);
    const third = admin.queryObject(SA, 3, 8);
    const fourth = admin.queryObject(SA, 4, 8);
    const both = receive();
    expect(both).toHaveLength(2);
    for (const command of both) command.reply(0, 0, Uint8Array.of(command.data[4]));
    expect([(await third)[0], (await fourth)[0]]).toEqual([3, 4]);
  });

  it('reject also those that wait behind commands that never come back', async () => {
    const { admin } = open({ timeout: 30, slots: 1 });
    const errors = await Promise.all([1, 2, 3].map((id) => failure(admin.destroyObject(SA, id))));
    for (const error of errors) expect(error).toMatchObject({ code: 'ADMIN_TIMEOUT' });
  });

  it('do not run for commands that wait while the device answers others', async () => {
    const { admin, serve } = open({ timeout: 1500, slots: 1 });
    serve((command) => {
      setTimeout(() => command.reply(0), 250);
    });
    await Promise.all(Array.from({ length: 8 }, (_, id) => admin.destroyObject(SA, id)));
  });
});

describe('a device that is lost', () => {
  it('in the middle of a command rejects it with DEVICE_GONE', async () => {
    const { device, admin, receive } = open({ timeout: 5000 });
    const errors = [1, 2].map((id) => failure(admin.destroyObject(SA, id)));
    receive();
    device.gone = true;
    for (const error of errors) {
      expect(await error).toBeInstanceOf(VfioError);
      expect(await error).toMatchObject({ code: 'DEVICE_GONE' });
    }
    expect(await failure(admin.listQuery())).toMatchObject({ code: 'DEVICE_GONE' });
  });

  it('before a command rejects it', async () => {
    const { device, admin } = open();
    device.gone = true;
    expect(await failure(admin.listQuery())).toMatchObject({ code: 'DEVICE_GONE' });
  });

  it('because it asks for a reset rejects what is pending', async () => {
    const { device, admin } = open({ timeout: 5000 });
    const error = failure(admin.listQuery());
    device.status |= DeviceStatus.DEVICE_NEEDS_RESET;
    expect(await error).toMatchObject({ code: 'DEVICE_NEEDS_RESET' });
  });
});

describe('an administration queue', () => {
  it('that is closed rejects what is pending and frees its memory once', async () => {
    const { device, admin } = open();
    const error = failure(admin.listQuery());
    admin.close();
    admin.close();
    expect(await error).toMatchObject({ code: 'ADMIN_CLOSED' });
    expect(device.memory.freed).toBe(1);
    expect(await failure(admin.listQuery())).toMatchObject({ code: 'ADMIN_CLOSED' });
  });

  it('finds its answers at once when it is polled', async () => {
    const { admin, receive } = open();
    const result = admin.listQuery();
    receive()[0].reply(0, 0, encodeIdList([3]));
    admin.poll();
    expect(admin.pending).toBe(0);
    expect(await result).toEqual([3]);
  });

  it('with a vector wants an interrupt for every answer', async () => {
    for (const features of [[], [Feature.EVENT_IDX]]) {
      const { admin, queue, receive } = open({ vector: 1 }, FeatureSet.of(Feature.VERSION_1, ...features));
      for (let i = 0; i < 3; i++) {
        const done = admin.destroyObject(SA, i);
        const [command] = receive();
        queue.writeUsed(command.head, 8);
        expect(queue.publishUsed()).toBe(true);
        admin.poll();
        await done;
      }
    }
  });

  it.each([0, 1, 3, 48])('is refused when the device gives it %s descriptors', (size) => {
    const device = new FakeDevice();
    device.maxSize = size;
    expect(() => new AdminQueue(device, device, FeatureSet.of(Feature.VERSION_1))).toThrow(
      expect.objectContaining({ code: 'QUEUE_SIZE' }),
    );
    expect(device.memory.blocks).toHaveLength(0);
  });

  it('is refused when the device has none', () => {
    const device = new FakeDevice();
    device.adminCount = 0;
    expect(() => new AdminQueue(device, device, FeatureSet.empty)).toThrow(
      expect.objectContaining({ code: 'ADMIN_QUEUE' }),
    );
  });
});

function findBytes(haystack: Uint8Array, needle: Uint8Array): number {
  return Buffer.from(haystack.buffer, haystack.byteOffset, haystack.length).indexOf(needle);
}
