import { describe, expect, it } from 'vitest';
import { validateSa } from '../../../src/ipsec/validate.ts';
import {
  type EspAttr,
  type FlowActionEspAttributes,
  type FlowActionEspModify,
  readAttributes,
  toSa,
} from '../../../src/ipsec/verbs/attributes.ts';
import {
  EspFlag,
  EspKeymat,
  EspMask,
  EspReplay,
  FlowSpecType,
  Ipv4SpecFlag,
  IvAlgorithm,
} from '../../../src/ipsec/verbs/numbers.ts';
import { key } from '../support.ts';

const keymat = { salt: key(4, 0x50), icvLen: 16, aesKey: key(16) };
const encap = [{ type: FlowSpecType.ipv4, val: { srcIp: '192.0.2.1', dstIp: '192.0.2.2' } }] as const;
const full = (flags = 0, attr: Partial<EspAttr> = {}): FlowActionEspAttributes => ({
  espAttr: { spi: 0x1000, flags: EspFlag.fullOffload | flags, ...attr },
  keymat,
  espEncap: encap,
});
const crypto: FlowActionEspAttributes = { espAttr: { flags: EspFlag.encrypt }, keymat };

describe('the numbers of the verbs', () => {
  it('are those of rdma/ib_user_ioctl_verbs.h and infiniband/verbs.h', () => {
    expect(EspFlag).toEqual({
      inlineCrypto: 0,
      fullOffload: 1,
      tunnel: 0,
      transport: 2,
      decrypt: 0,
      encrypt: 4,
      esnNewWindow: 8,
    });
    expect([EspMask.esn, EspKeymat.aesGcm, IvAlgorithm.sequential]).toEqual([1, 0, 0]);
    expect([EspReplay.none, EspReplay.bitmap]).toEqual([0, 1]);
    expect(FlowSpecType).toEqual({ ipv4: 0x30, ipv6: 0x31, ipv4Ext: 0x32, esp: 0x34, tcp: 0x40, udp: 0x41 });
    expect(Ipv4SpecFlag).toEqual({ dontFragment: 2, moreFragments: 4 });
  });
});

describe('attributes of an action', () => {
  const refused: [string, FlowActionEspModify, string][] = [
    ['no attributes', { keymat }, 'espAttr'],
    ['no key', { espAttr: { flags: 0 } }, 'keymat'],
    ['an unknown flag', { ...crypto, espAttr: { flags: 16 } }, 'espAttr.flags'],
    ['a fraction of a flag', { ...crypto, espAttr: { flags: 0.5 } }, 'espAttr.flags'],
    ['SPI 0 in full offload', full(0, { spi: 0 }), 'espAttr.spi'],
    ['an SPI of 33 bits', full(0, { spi: 2 ** 32 }), 'espAttr.spi'],
    ['a negative limit', full(0, { hardLimitPkts: -1n }), 'espAttr.hardLimitPkts'],
    ['an SPI in inline crypto', { ...crypto, espAttr: { flags: 4, spi: 1 } }, 'espAttr.spi'],
    ['a sequence number in inline crypto', { ...crypto, espAttr: { flags: 4, seq: 1 } }, 'espAttr.seq'],
    ['TFC padding in inline crypto', { ...crypto, espAttr: { flags: 4, tfcPad: 1 } }, 'espAttr.tfcPad'],
    ['a limit in inline crypto', { ...crypto, espAttr: { flags: 4, hardLimitPkts: 1n } }, 'espAttr.hardLimitPkts'],
    ['a replay window in inline crypto', { ...crypto, espAttr: { flags: 0 }, replay: { size: 64 } }, 'replay'],
    ['encapsulation in inline crypto', { ...crypto, espEncap: encap }, 'espEncap'],
    ['a new window without an ESN', { ...crypto, espAttr: { flags: 12 } }, 'espAttr.flags'],
    ['a new window in full offload', { ...full(8), compMask: 1, esn: 0 }, 'espAttr.flags'],
    ['an unknown mask', { ...crypto, compMask: 2 }, 'compMask'],
    ['an ESN of 33 bits', { ...crypto, compMask: 1, esn: 2 ** 32 }, 'esn'],
    ['an unknown keymat', { ...crypto, keymatProto: 1 }, 'keymatProto'],
    ['an unknown IV algorithm', { ...crypto, keymat: { ...keymat, ivAlgo: 1 } }, 'keymat.ivAlgo'],
    ['a key of 17 bytes', { ...crypto, keymat: { ...keymat, aesKey: key(17) } }, 'keymat.aesKey'],
    ['a salt of 3 bytes', { ...crypto, keymat: { ...keymat, salt: key(3) } }, 'keymat.salt'],
    ['an ICV of 10 bytes', { ...crypto, keymat: { ...keymat, icvLen: 10 } }, 'keymat.icvLen'],
    ['an IV of 65 bits', { ...full(4), keymat: { ...keymat, iv: 1n << 64n } }, 'keymat.iv'],
    ['a replay window for encryption', { ...full(4), replay: { size: 64 } }, 'replay'],
    ['an empty replay window', { ...full(), replay: { size: 0 } }, 'replay.size'],
    ['a replay window that is none', { ...full(), replay: { size: 64 }, replayProto: 0 }, 'replay'],
    ['no replay window where one is announced', { ...full(), replayProto: 1 }, 'replay'],
    ['an unknown replay protection', { ...full(), replayProto: 2 }, 'replayProto'],
    ['a tunnel without header', { ...full(), espEncap: [] }, 'espEncap'],
    ['a header in transport mode', full(EspFlag.transport), 'espEncap'],
    ['two IP headers', { ...full(), espEncap: [...encap, ...encap] }, 'espEncap'],
    ['UDP in front of IP', { ...full(), espEncap: [udp(1, 2), ...encap] }, 'espEncap'],
    ['UDP twice', { ...full(2), espEncap: [udp(1, 2), udp(1, 2)] }, 'espEncap'],
  ];
  it.each(refused)('are refused with %s', (_name, attributes, path) => {
    expect(() => readAttributes(attributes, null)).toThrow(
      expect.objectContaining({ code: 'FLOW_ACTION_ATTRIBUTE', path }),
    );
  });

  it('become an SA that says all of it', () => {
    const v6 = {
      type: FlowSpecType.ipv6,
      val: {
        srcIp: '2001:db8::1',
        dstIp: '2001:db8::2',
        flowLabel: 0x12345,
        nextHdr: 17,
        trafficClass: 0xb8,
        hopLimit: 9,
      },
    } as const;
    const attributes: FlowActionEspAttributes = {
      espAttr: {
        spi: 0xabcd,
        seq: 7,
        tfcPad: 100,
        flags: EspFlag.fullOffload | EspFlag.encrypt,
        hardLimitPkts: 1n << 40n,
      },
      keymat: { ...keymat, iv: 0x0102030405060708n, icvLen: 12 },
      espEncap: [v6, udp(4500, 4501)],
      compMask: EspMask.esn,
      esn: 3,
    };
    const sa = validateSa(toSa(readAttributes(attributes, null)));
    expect(sa).toMatchObject({
      direction: 'outbound',
      protocol: 'esp',
      mode: 'tunnel',
      spi: 0xabcd,
      options: { esn: true },
      tfcPadding: 100,
      lifetime: { hardPackets: 1n << 40n },
      tunnel: { ttl: 9, dscp: 46, flowLabel: 0x12345 },
      udpEncap: { sourcePort: 4500, destinationPort: 4501 },
      initial: { sequence: (3n << 32n) | 7n, iv: Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8) },
      aead: { name: 'aes-gcm', icvLength: 12 },
    });
    expect([...sa.aead!.key]).toEqual([...keymat.aesKey]);
    expect([...sa.aead!.salt]).toEqual([...keymat.salt]);
  });

  it('begin with number 1 and no replay check unless they say otherwise, with the highest number accepted when they decrypt', () => {
    expect(toSa(readAttributes(full(EspFlag.encrypt), null)).initial).toEqual({ sequence: 1n });
    const sa = toSa(readAttributes({ ...full(0, { seq: 9 }), replay: { size: 128 }, replayProto: 1 }, null));
    expect(sa).toMatchObject({ direction: 'inbound', initial: { sequence: 9n }, replayWindow: 128 });
    expect(toSa(readAttributes(full(), null)).replayWindow).toBe(0);
  });

  it('take DF, TTL and DSCP from the IPv4 header, and refuse what an action cannot set', () => {
    const ext = (val: object) => ({
      ...full(EspFlag.encrypt),
      espEncap: [{ type: FlowSpecType.ipv4Ext, val: { srcIp: '192.0.2.1', dstIp: '192.0.2.2', ...val } }],
    });
    const made = (val: object) => validateSa(toSa(readAttributes(ext(val), null)));
    expect(made({ tos: 0xb8, ttl: 5, flags: 2, proto: 50 }).tunnel).toMatchObject({ dscp: 46, ttl: 5, df: true });
    expect(made({}).tunnel).toMatchObject({ dscp: 0, ttl: 64, df: false });
    for (const val of [{ tos: 1 }, { flags: 4 }, { proto: 17 }]) {
      expect(() => made(val)).toThrow(expect.objectContaining({ code: 'FLOW_ACTION_ATTRIBUTE' }));
    }
  });

  it('stay as they are where a modify does not name them', () => {
    const before = readAttributes(
      { ...full(0, { seq: 5 }), replay: { size: 64 }, compMask: 1, esn: 2, keymat: { ...keymat, icvLen: 8 } },
      null,
    );
    const same = readAttributes({}, before);
    expect({ ...same, key: [...same.key], salt: [...same.salt] }).toEqual({
      ...before,
      key: [...before.key],
      salt: [...before.salt],
    });
    expect(same.key).not.toBe(before.key);
    expect(readAttributes({ replayProto: EspReplay.none }, before).replaySize).toBe(0);
    expect(readAttributes({ compMask: 1, esn: 9 }, before).esn).toBe(9);
    expect(readAttributes({ esn: 9 }, before).esn).toBe(2);
    const attr = readAttributes({ espAttr: { flags: EspFlag.fullOffload, spi: 2 } }, before);
    expect(attr).toMatchObject({ spi: 2, seq: 0, replaySize: 64, icvLen: 8 });
  });

  it('cannot change what an action is', () => {
    const before = readAttributes(full(), null);
    const wrong = expect.objectContaining({ code: 'FLOW_ACTION_ATTRIBUTE' });
    expect(() => readAttributes({ espAttr: { spi: 1, flags: EspFlag.fullOffload | EspFlag.encrypt } }, before)).toThrow(
      wrong,
    );
    expect(() => readAttributes({ espAttr: { flags: EspFlag.inlineCrypto } }, before)).toThrow(wrong);
    expect(() => readAttributes({ compMask: 1, esn: 1 }, before)).toThrow(wrong);
  });
});

function udp(srcPort: number, dstPort: number) {
  return { type: FlowSpecType.udp, val: { srcPort, dstPort } } as const;
}
