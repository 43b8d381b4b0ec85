import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  AdminOpcode,
  AdminStatus,
  adminOpcodeName,
  adminPartLength,
  adminQualifierName,
  adminStatusName,
  capabilityName,
  decodeAdminCommand,
  decodeAdminReply,
  decodeCapabilityCommand,
  decodeDevicePartsCapability,
  decodeIdList,
  decodeResourceCommand,
  encodeAdminCommand,
  encodeAdminReply,
  encodeCapabilityCommand,
  encodeIdList,
  encodeResourceCommand,
  resourceTypeName,
} from '../../src/virtio/admin-wire.ts';
import { WIRE_REVISIONS } from '../../src/virtio/revision.ts';

const u16 = fc.nat(0xffff);
const u32 = fc.nat(0xffffffff);
const u64 = fc.bigInt({ min: 0n, max: 2n ** 64n - 1n });
const bytes = fc.uint8Array({ maxLength: 300 });

describe('an administration command', () => {
  it('has its fields where struct virtio_admin_cmd has them', () => {
    const out = new Uint8Array(40).fill(0xff);
    const command = {
      opcode: 0x0201,
      groupType: 0x0403,
      groupMemberId: 0x0c0b0a0908070605n,
      data: Uint8Array.of(77, 78),
    };
    expect(encodeAdminCommand(out, command)).toBe(32);
    expect([...out.subarray(0, 33)]).toEqual([
      1,
      2,
      3,
      4,
      ...new Array(12).fill(0),
      5,
      6,
      7,
      8,
      9,
      10,
      11,
      12,
      77,
      78,
      0,
      0,
      0,
      0,
      0,
      0,
      255,
    ]);
  });

  it('is read back as it was written, with padding that is zero', () => {
    fc.assert(
      fc.property(u16, u16, u64, bytes, (opcode, groupType, groupMemberId, data) => {
        const out = new Uint8Array(400);
        const length = encodeAdminCommand(out, { opcode, groupType, groupMemberId, data });
        expect(length % 8).toBe(0);
        const decoded = decodeAdminCommand(out.subarray(0, length));
        expect(decoded).toMatchObject({ opcode, groupType, groupMemberId });
        expect([...decoded.data.subarray(0, data.length)]).toEqual([...data]);
        expect(decoded.data.subarray(data.length).every((byte) => byte === 0)).toBe(true);
      }),
    );
  });

  it('that is cut anywhere reads as if zeros followed', () => {
    const out = new Uint8Array(32);
    encodeAdminCommand(out, {
      opcode: 0xaaaa,
      groupType: 0xbbbb,
      groupMemberId: 2n ** 64n - 1n,
      data: Uint8Array.of(1),
    });
    for (let length = 0; length <= 32; length++) {
      const padded = new Uint8Array(32);
      padded.set(out.subarray(0, length));
      const { data: _a, ...cut } = decodeAdminCommand(out.subarray(0, length));
      const { data: _b, ...whole } = decodeAdminCommand(padded);
      expect(cut).toEqual(whole);
    }
  });

  it('does not leave the buffer that it is written to', () => {
    const command = { opcode: 1, groupType: 0, groupMemberId: 0n, data: new Uint8Array(9) };
    expect(() => encodeAdminCommand(new Uint8Array(39), command)).toThrow(RangeError);
    expect(encodeAdminCommand(new Uint8Array(40), command)).toBe(40);
  });
});

describe('a reply', () => {
  it('is read back as it was written, and is a multiple of 8 long', () => {
    fc.assert(
      fc.property(u16, u16, bytes, (status, qualifier, result) => {
        const encoded = encodeAdminReply({ status, qualifier, result });
        expect(encoded.length).toBe(adminPartLength(8 + result.length));
        const decoded = decodeAdminReply(encoded);
        expect(decoded).toMatchObject({ status, qualifier });
        expect([...decoded.result.subarray(0, result.length)]).toEqual([...result]);
      }),
    );
  });

  it('of any length is read without an error', () => {
    expect(decodeAdminReply(new Uint8Array(0))).toMatchObject({ status: 0, qualifier: 0 });
    expect(decodeAdminReply(Uint8Array.of(22, 0, 3))).toMatchObject({ status: 22, qualifier: 3 });
  });
});

describe('a list of ids', () => {
  it('is the array of the standard’s example', () => {
    expect([...encodeIdList([0, 1, 64])]).toEqual([3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
  });

  it('is read back, and trailing zeros change nothing', () => {
    fc.assert(
      fc.property(fc.uniqueArray(u16, { maxLength: 40 }), fc.nat(20), (ids, zeros) => {
        const encoded = encodeIdList(ids);
        expect(encoded.length % 8).toBe(0);
        const longer = new Uint8Array(encoded.length + zeros);
        longer.set(encoded);
        expect(decodeIdList(longer)).toEqual([...ids].sort((a, b) => a - b));
      }),
    );
  });

  it('that is longer than 65536 bits ends there', () => {
    const all = new Uint8Array(0x10000 / 8 + 8);
    all[0x10000 / 8] = 0xff;
    expect(decodeIdList(all)).toEqual([]);
  });
});

describe('a capability command', () => {
  it('has the id, six reserved bytes, and the capability', () => {
    expect([...encodeCapabilityCommand(0x0804)]).toEqual([4, 8, 0, 0, 0, 0, 0, 0]);
    expect([...encodeCapabilityCommand(0x0804, Uint8Array.of(9))]).toEqual([4, 8, 0, 0, 0, 0, 0, 0, 9]);
  });

  it('is read back', () => {
    fc.assert(
      fc.property(u16, bytes, (id, data) => {
        const decoded = decodeCapabilityCommand(encodeCapabilityCommand(id, data));
        expect(decoded.id).toBe(id);
        expect([...decoded.data]).toEqual([...data]);
      }),
    );
    expect(decodeCapabilityCommand(new Uint8Array(1)).id).toBe(0);
  });
});

describe.each(WIRE_REVISIONS)('an object command of %s', (revision) => {
  it.each([AdminOpcode.RESOURCE_OBJ_CREATE, AdminOpcode.RESOURCE_OBJ_MODIFY, AdminOpcode.RESOURCE_OBJ_QUERY])(
    'with opcode %s is read back',
    (opcode) => {
      fc.assert(
        fc.property(u16, u32, u64, bytes, (type, id, flags, object) => {
          const encoded = encodeResourceCommand(revision, opcode, { type, id, flags, object });
          expect(encoded.length).toBe(16 + object.length);
          const decoded = decodeResourceCommand(revision, opcode, encoded);
          expect(decoded).toMatchObject({ type, id, flags });
          expect([...decoded.object]).toEqual([...object]);
        }),
      );
    },
  );

  it('that destroys has flags only in the draft', () => {
    const data = encodeResourceCommand(revision, AdminOpcode.RESOURCE_OBJ_DESTROY, {
      type: 0x0203,
      id: 0x04030201,
      flags: 5n,
    });
    const head = [3, 2, 0, 0, 1, 2, 3, 4];
    expect([...data]).toEqual(revision === 'virtio-1.4' ? head : [...head, 5, 0, 0, 0, 0, 0, 0, 0]);
    expect(decodeResourceCommand(revision, AdminOpcode.RESOURCE_OBJ_DESTROY, data)).toMatchObject({
      type: 0x203,
      id: 0x04030201,
      flags: revision === 'virtio-1.4' ? 0n : 5n,
    });
  });

  it('of any length is read without an error', () => {
    for (let length = 0; length < 16; length++) {
      const decoded = decodeResourceCommand(revision, AdminOpcode.RESOURCE_OBJ_CREATE, new Uint8Array(length).fill(1));
      expect(decoded.object).toHaveLength(0);
    }
  });
});

describe('names', () => {
  it('are the standard’s, and a number for what it does not define', () => {
    expect(adminOpcodeName(0xa)).toBe('RESOURCE_OBJ_CREATE');
    expect(adminOpcodeName(0x77)).toBe('0x77');
    expect(adminStatusName(AdminStatus.EEXIST)).toBe('EEXIST');
    expect(adminStatusName(5)).toBe('status 5');
    expect(adminQualifierName(2)).toBe('INVALID_OPCODE');
    expect(adminQualifierName(9)).toBe('qualifier 9');
    expect(capabilityName(0x804)).toBe('NET_IPSEC_SA');
    expect(resourceTypeName(0x999)).toBe('0x999');
    expect(decodeDevicePartsCapability(Uint8Array.of(3))).toEqual({ get: 3, set: 0 });
  });
});
