/**
 * Numbers of the RDMA verbs' ESP action, as `rdma/ib_user_ioctl_verbs.h` and `infiniband/verbs.h` have them. Several names are 0: they
 * say what is when the other bit is not set.
 */

/** `IB_UVERBS_FLOW_ACTION_ESP_FLAGS_*`: bits of `EspAttr.flags`. */
export const EspFlag = {
  inlineCrypto: 0,
  fullOffload: 1 << 0,
  tunnel: 0,
  transport: 1 << 1,
  decrypt: 0,
  encrypt: 1 << 2,
  esnNewWindow: 1 << 3,
} as const;

/** `IBV_FLOW_ACTION_ESP_MASK_*`: bits of `FlowActionEspAttributes.compMask`. */
export const EspMask = { esn: 1 << 0 } as const;

/** `IB_UVERBS_FLOW_ACTION_ESP_KEYMAT_*`. */
export const EspKeymat = { aesGcm: 0 } as const;

/** `IB_UVERBS_FLOW_ACTION_IV_ALGO_*`. */
export const IvAlgorithm = { sequential: 0 } as const;

/** `IB_UVERBS_FLOW_ACTION_ESP_REPLAY_*`. */
export const EspReplay = { none: 0, bitmap: 1 } as const;

/** `IBV_FLOW_SPEC_*`: types of headers. */
export const FlowSpecType = { ipv4: 0x30, ipv6: 0x31, ipv4Ext: 0x32, esp: 0x34, tcp: 0x40, udp: 0x41 } as const;

/** `IB_IPV4_*`: `flags` of an `ipv4Ext` header, the three bits in front of the fragment offset (RFC 791, 3.1). */
export const Ipv4SpecFlag = { dontFragment: 0x2, moreFragments: 0x4 } as const;
